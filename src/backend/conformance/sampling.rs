//! What each sampling parameter must do, and what a slot remembers.

use super::*;

/// Of the first row, without a mask.
fn request(slot: u32, output_index: u32) -> SampleRequest {
    SampleRequest {
        logit_row: 0,
        slot,
        output_index,
        mask: None,
    }
}

impl<B: Backend> Suite<'_, B> {
    fn start(&mut self, sampler: &mut B::Sampler, slot: u32, params: SamplingParams, output: &[TokenId]) {
        let started = StartedSlot {
            slot,
            sampling: Arc::new(params),
            prompt: Arc::from([3, 5]),
            output: output.to_vec(),
        };
        self.backend.start_slot(sampler, &started).expect("start_slot");
    }

    fn logits(&mut self, logits: &[f32], vocab: usize) -> B::Tensor {
        let mut out = self
            .backend
            .tensor(logits.len() / vocab, vocab, DType::F32)
            .expect("tensor");
        self.backend.write(&mut out, logits).expect("write");
        out
    }

    fn sample(&mut self, logits: &B::Tensor, sampler: &mut B::Sampler, r: &[SampleRequest]) -> Vec<SampledToken> {
        self.backend.sample(logits, r, sampler).expect("sample");
        self.sampled(sampler, r.len())
    }

    fn sampled(&mut self, sampler: &mut B::Sampler, count: usize) -> Vec<SampledToken> {
        let mut out = Vec::new();
        self.backend.sampled(sampler, &mut out).expect("sampled");
        assert_eq!(out.len(), count, "one token per request");
        out
    }

    /// The report on `next_token` of slot 0 in the first row.
    fn score(&mut self, logits: &B::Tensor, sampler: &mut B::Sampler, next_token: TokenId) -> TokenLogprobs {
        let request = ScoreRequest {
            logit_row: 0,
            slot: 0,
            next_token,
        };
        let mut out = Vec::new();
        self.backend
            .score(logits, &[request], sampler, &mut out)
            .expect("score");
        out.pop().expect("one report per request")
    }

    /// Deterministic consequences of each parameter.
    pub(super) fn sampling(&mut self) {
        const V: usize = 1000;
        let greedy = SamplingParams {
            temperature: 0.0,
            ..Default::default()
        };
        let mut logits: Vec<f32> = (0..V).map(|i| (i % 97) as f32 / 97.0).collect();
        // Best to worst: 700, 3, 11, 12 (equal to 11), 5.
        for (id, x) in [(700, 9.0), (3, 8.0), (11, 7.5), (12, 7.5), (5, 7.0)] {
            logits[id] = x;
        }
        let mask = |ids: &[usize]| {
            let mut words = vec![0u32; V.div_ceil(32)];
            ids.iter().for_each(|id| words[id / 32] |= 1 << (id % 32));
            Some(TokenMask(words.into()))
        };
        let with = |change: &dyn Fn(&mut SamplingParams)| {
            let mut params = greedy.clone();
            change(&mut params);
            params
        };
        type Case<'a> = (&'a str, SamplingParams, &'a [TokenId], Option<TokenMask>, TokenId);
        let cases: Vec<Case<'_>> = vec![
            ("greedy", greedy.clone(), &[], None, 700),
            ("mask", greedy.clone(), &[], mask(&[12, 11, 5]), 11),
            (
                "allowed",
                with(&|p| p.allowed_token_ids = Some(vec![5, 12])),
                &[],
                None,
                12,
            ),
            (
                "bad word",
                with(&|p| p.bad_words = vec![vec![700], vec![9, 3]]),
                &[9],
                None,
                11,
            ),
            (
                "bad word, other prefix",
                with(&|p| p.bad_words = vec![vec![700], vec![9, 3]]),
                &[8],
                None,
                3,
            ),
            (
                "bias",
                with(&|p| p.logit_bias = vec![(700, -5.0), (5, 3.0)]),
                &[],
                None,
                5,
            ),
            ("repetition", with(&|p| p.repetition_penalty = 2.0), &[700], None, 11),
            ("presence", with(&|p| p.presence_penalty = 1.25), &[700, 700], None, 3),
            ("frequency", with(&|p| p.frequency_penalty = 0.9), &[700, 700], None, 3),
            (
                "top-k 1",
                with(&|p| (p.temperature, p.top_k) = (1.0, 1)),
                &[],
                None,
                700,
            ),
            (
                "top-p tiny",
                with(&|p| (p.temperature, p.top_p) = (1.0, 1e-6)),
                &[],
                None,
                700,
            ),
            (
                "min-p 1",
                with(&|p| (p.temperature, p.min_p) = (1.0, 1.0)),
                &[],
                None,
                700,
            ),
            ("cold", with(&|p| p.temperature = 1e-4), &[], None, 700),
            (
                "min tokens",
                with(&|p| (p.min_tokens, p.min_tokens_suppressed) = (3, vec![700, 3])),
                &[1, 2],
                None,
                11,
            ),
            (
                "min tokens reached",
                with(&|p| (p.min_tokens, p.min_tokens_suppressed) = (2, vec![700])),
                &[1, 2],
                None,
                700,
            ),
        ];
        let mut sampler = self.backend.sampler(2, V, 2).expect("sampler");
        for (name, params, output, mask, want) in cases {
            self.start(&mut sampler, 1, params, output);
            // Biases stay in the row.
            let lt = self.logits(&logits, V);
            let request = SampleRequest {
                mask,
                ..request(1, output.len() as u32)
            };
            let got = self.sample(&lt, &mut sampler, &[request]);
            assert_eq!((got[0].id, got[0].logprobs.is_some()), (want, false), "sample: {name}");
        }

        let params = SamplingParams {
            logprobs: Some(3),
            prompt_logprobs: Some(1),
            temperature: 0.0,
            ..greedy.clone()
        };
        self.start(&mut sampler, 0, params, &[]);
        let lt = self.logits(&logits, V);
        let masked = SampleRequest {
            mask: mask(&[12]),
            ..request(0, 0)
        };
        let got = self.sample(&lt, &mut sampler, &[masked]);
        let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let logprob = |id: usize| (f64::from(logits[id]) - total.ln()) as f32;
        let near = |a: f32, b: f32| assert!((a - b).abs() < 1e-4, "logprob {a}, not {b}");
        let report = got[0].logprobs.as_ref().expect("logprobs were asked for");
        assert_eq!((got[0].id, report.id), (12, 12));
        // 700, 3, 11 and 12 itself are at least as likely.
        assert_eq!(report.rank, 4);
        near(report.logprob, logprob(12));
        assert_eq!(report.top.iter().map(|t| t.0).collect::<Vec<_>>(), [700, 3, 11]);
        report.top.iter().for_each(|&(id, p)| near(p, logprob(id as usize)));

        let score = self.score(&lt, &mut sampler, 5);
        assert_eq!((score.id, score.rank, score.top.len()), (5, 5, 1));
        near(score.logprob, logprob(5));

        // Processed: after temperature and top-k, over what is left.
        let params = SamplingParams {
            temperature: 0.5,
            top_k: 2,
            logprobs: Some(2),
            logprobs_mode: LogprobsMode::ProcessedLogprobs,
            ..greedy
        };
        self.start(&mut sampler, 0, params, &[]);
        let got = self.sample(&lt, &mut sampler, &[request(0, 0)]);
        let report = got[0].logprobs.as_ref().expect("logprobs were asked for");
        near(report.top[0].1, -(1.0f32 + (-2.0f32).exp()).ln());
        near(report.top[1].1, -2.0 - (1.0f32 + (-2.0f32).exp()).ln());
    }

    /// Which tokens of a large vocabulary min-p, top-k and top-p leave, by the processed log-probability of the best: it says what
    /// all that are left weigh.
    pub(super) fn kept_tokens(&mut self) {
        for vocab in [9001usize, 128_000] {
            // A few likely tokens over many unlikely ones, of both signs, some of them equal.
            let uniform = self.rng.values(vocab);
            let logits: Vec<f32> = uniform
                .iter()
                .map(|u| (12.0 * u * u * u * 32.0).round() / 32.0)
                .collect();
            let mut sorted = logits.clone();
            sorted.sort_unstable_by(|a, b| b.total_cmp(a));
            let mut sampler = self.backend.sampler(1, vocab, 1).expect("sampler");
            for (temperature, top_k, top_p, min_p) in [
                (1.0, 0, 1.0, 0.0),
                (0.7, 50, 1.0, 0.0),
                (1.3, 3000, 1.0, 0.0),
                (1.0, 8500, 1.0, 0.0),
                (0.3, 0, 0.9, 0.0),
                (1.5, 0, 0.99, 0.0),
                (0.3, 0, 1.0, 0.15),
                (2.0, 2000, 0.8, 0.05),
            ] {
                let params = SamplingParams {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    logprobs: Some(1),
                    logprobs_mode: LogprobsMode::ProcessedLogprobs,
                    ..Default::default()
                };
                let weight = |l: f32| (f64::from(l - sorted[0]) / f64::from(temperature)).exp();
                let mut kept: Vec<f32> = sorted
                    .iter()
                    .copied()
                    .filter(|l| weight(*l) >= f64::from(min_p))
                    .collect();
                if let Some(&last) = (top_k as usize).checked_sub(1).and_then(|i| kept.get(i)) {
                    kept.retain(|l| *l >= last);
                }
                // Of equal values at top-p's edge a backend may keep as many as reach it, or all.
                let total = |kept: &[f32]| kept.iter().map(|l| weight(*l)).sum::<f64>();
                let (target, mut sum) = (total(&kept) * f64::from(top_p), 0.0);
                let reach = kept.iter().position(|l| {
                    sum += weight(*l);
                    sum >= target
                });
                let mut fewest = total(&kept);
                if let (Some(reach), true) = (reach, top_p < 1.0) {
                    fewest = total(&kept[..=reach]);
                    let last = kept[reach];
                    kept.retain(|l| *l >= last);
                }
                let (most_likely, least_likely) = (-fewest.ln(), -total(&kept).ln());
                self.start(&mut sampler, 0, params, &[]);
                let lt = self.logits(&logits, vocab);
                let got = self.sample(&lt, &mut sampler, &[request(0, 3)]);
                let report = got[0].logprobs.as_ref().expect("logprobs were asked for");
                let case =
                    format!("{vocab} tokens, temperature {temperature}, top-k {top_k}, top-p {top_p}, min-p {min_p}");
                let best = f64::from(report.top[0].1);
                assert!(
                    best > least_likely - 1e-3 && best < most_likely + 1e-3,
                    "{case}: {best} for the best, not {least_likely} to {most_likely}"
                );
                let drawn = logits[got[0].id as usize];
                let least = kept.last().copied().unwrap_or_default();
                assert!(drawn >= least, "{case}: drew {drawn}, below {least}");
                assert!(
                    (f64::from(report.logprob) - (weight(drawn).ln() + best)).abs() < 1e-3,
                    "{case}: {report:?}"
                );
            }
        }
    }

    /// How often each of a few tokens is drawn, and that no unlikely one of many ever is.
    pub(super) fn draws(&mut self) {
        const DRAWS: u32 = 4000;
        let free = |seed| SamplingParams {
            seed,
            ..Default::default()
        };
        let mut sampler = self.backend.sampler(1, 5, 1).expect("sampler");
        self.start(&mut sampler, 0, free(7), &[]);
        let chances = [0.4f32, 0.3, 0.2, 0.09, 0.01];
        let logits = chances.map(f32::ln);
        let lt = self.logits(&logits, 5);
        let mut times = [0.0f32; 5];
        for i in 0..DRAWS {
            let got = self.sample(&lt, &mut sampler, &[request(0, i)]);
            times[got[0].id as usize] += 1.0;
        }
        for (id, (&chance, &times)) in chances.iter().zip(&times).enumerate() {
            let expected = chance * DRAWS as f32;
            let deviation = (expected * (1.0 - chance)).sqrt();
            assert!(
                (times - expected).abs() < 4.0 * deviation,
                "token {id} was drawn {times} times, not {expected} ± {deviation}"
            );
        }

        // All others together have a chance of 6e-9 a draw.
        const V: usize = 65_536;
        let mut sampler = self.backend.sampler(1, V, 1).expect("sampler");
        self.start(&mut sampler, 0, free(42), &[]);
        let mut logits = vec![0.0; V];
        logits[0] = 30.0;
        let lt = self.logits(&logits, V);
        for i in 0..500 {
            let got = self.sample(&lt, &mut sampler, &[request(0, i)]);
            assert_eq!(got[0].id, 0, "draw {i}");
        }
    }

    /// As many alternatives as may be asked for, with a token and in a prompt, whose log-probabilities no mode changes.
    pub(super) fn alternatives(&mut self) {
        const V: usize = 1000;
        let logits: Vec<f32> = (0..V).map(|i| (i * 37 % V) as f32 / 100.0).collect();
        let total = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        let mut best: Vec<TokenId> = (0..V as u32).collect();
        best.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
        let mut sampler = self.backend.sampler(1, V, 1).expect("sampler");
        let lt = self.logits(&logits, V);
        for (mode, subtracted) in [(LogprobsMode::RawLogprobs, total), (LogprobsMode::RawLogits, 0.0)] {
            let params = SamplingParams {
                temperature: 0.0,
                logprobs: Some(MAX_LOGPROBS as u32),
                prompt_logprobs: Some(MAX_LOGPROBS as u32),
                logprobs_mode: mode,
                ..Default::default()
            };
            self.start(&mut sampler, 0, params, &[]);
            let sampled = self.sample(&lt, &mut sampler, &[request(0, 0)]);
            let score = self.score(&lt, &mut sampler, 5);
            let with_token = sampled[0].logprobs.as_ref().expect("logprobs were asked for");
            for (report, subtracted) in [(with_token, subtracted), (&score, total)] {
                let ids: Vec<TokenId> = report.top.iter().map(|&(id, _)| id).collect();
                assert_eq!(ids, best[..MAX_LOGPROBS]);
                for &(id, p) in &report.top {
                    let want = f64::from(logits[id as usize]) - subtracted;
                    assert!((f64::from(p) - want).abs() < 1e-3, "{id}: {p}, not {want}");
                }
            }
        }
    }

    /// The same request many times in one step: as it is alone, whatever a backend makes of their number.
    pub(super) fn many_requests(&mut self) {
        const V: usize = 128_000;
        const MOST: usize = 250;
        let logits: Vec<f32> = self.rng.values(V).iter().map(|u| 12.0 * u * u * u).collect();
        let mut sampler = self.backend.sampler(MOST, V, MOST).expect("sampler");
        let lt = self.logits(&logits, V);
        let drawing = |change: &dyn Fn(&mut SamplingParams)| {
            let mut params = SamplingParams {
                temperature: 0.7,
                logprobs: Some(2),
                ..Default::default()
            };
            change(&mut params);
            params
        };
        for (name, params) in [
            ("greedy", drawing(&|p| (p.temperature, p.logprobs) = (0.0, None))),
            ("top-p", drawing(&|p| p.top_p = 0.95)),
            ("top-k", drawing(&|p| (p.top_k, p.logprobs) = (50, None))),
            (
                "top-k, top-p, min-p",
                drawing(&|p| (p.top_k, p.top_p, p.min_p) = (500, 0.9, 0.01)),
            ),
            (
                "penalties",
                drawing(&|p| (p.top_k, p.repetition_penalty, p.presence_penalty) = (40, 1.3, 0.5)),
            ),
        ] {
            let mut alone = Vec::new();
            for count in [1, 20, 50, MOST as u32] {
                let slots = MOST as u32 - count..MOST as u32;
                for slot in slots.clone() {
                    self.start(&mut sampler, slot, params.clone(), &[7, 7, 9]);
                }
                let requests: Vec<_> = slots.map(|slot| request(slot, 3)).collect();
                let got = self.sample(&lt, &mut sampler, &requests);
                if alone.is_empty() {
                    alone.extend(got.first().cloned());
                }
                for (i, one) in got.iter().enumerate() {
                    assert_eq!(one, &alone[0], "{name}: request {i} of {count}");
                }
            }
        }
    }

    /// Two steps under way, each sampled twice: the rows without a mask, and those with one.
    pub(super) fn unread_samples(&mut self) {
        const V: usize = 100;
        let mut sampler = self.backend.sampler(4, V, 4).expect("sampler");
        let logits: Vec<f32> = (0..4 * V)
            .map(|i| if i % V == 10 + i / V { 1.0 } else { 0.0 })
            .collect();
        let lt = self.logits(&logits, V);
        for round in 0..2 {
            for slot in 0..4 {
                let greedy = SamplingParams {
                    temperature: 0.0,
                    ..Default::default()
                };
                self.start(&mut sampler, slot, greedy, &[]);
                let request = SampleRequest {
                    logit_row: slot as usize,
                    ..request(slot, 0)
                };
                self.backend.sample(&lt, &[request], &mut sampler).expect("sample");
            }
            for row in 0..4 {
                let got = self.sampled(&mut sampler, 1);
                assert_eq!(got[0].id, 10 + row, "sample {row} of round {round}");
            }
        }
    }

    /// Feedback, resumption, and independence of neighbours.
    pub(super) fn sampling_state(&mut self) {
        const V: usize = 500;
        let rows: Vec<f32> = self.rng.values(4 * V).iter().map(|x| x * 3.0).collect();
        let params = |seed| SamplingParams {
            seed,
            top_p: 0.95,
            ..Default::default()
        };
        let lt = self.logits(&rows, V);
        let mut sampler = self.backend.sampler(4, V, 4).expect("sampler");
        let request = |row: usize, slot, output_index| SampleRequest {
            logit_row: row,
            ..request(slot, output_index)
        };
        (0..4).for_each(|slot| self.start(&mut sampler, slot, params(u64::from(slot) << 33 | 7), &[]));
        let together: Vec<Vec<TokenId>> = (0..8)
            .map(|i| {
                let requests: Vec<_> = (0..4).map(|slot| request(slot as usize, slot, i)).collect();
                self.sample(&lt, &mut sampler, &requests).iter().map(|s| s.id).collect()
            })
            .collect();
        assert!(
            together.iter().any(|ids| *ids != together[0]),
            "eight draws with different indices are all equal"
        );
        // Slot 2's sequence again, alone, in another slot and another row, resumed in the middle.
        self.start(
            &mut sampler,
            0,
            params(2 << 33 | 7),
            &together.iter().take(3).map(|ids| ids[2]).collect::<Vec<_>>(),
        );
        let lt = self.logits(&[&rows[..V], &rows[2 * V..3 * V]].concat(), V);
        for (i, ids) in together.iter().enumerate().skip(3) {
            let got = self.sample(&lt, &mut sampler, &[request(1, 0, i as u32)]);
            assert_eq!(
                got[0].id, ids[2],
                "a draw depends on more than (seed, output index): draw {i}"
            );
        }

        const W: usize = 8;
        let table: Vec<f32> = (0..V * W).map(|i| (i / W % 128) as f32).collect();
        let wt = self.weight(&[V, W], &table, self.options.vectors);
        let mut b = layout(&[piece(3, 4, 1), piece(1, 0, 2), piece(0, 9, 1)], 4, 1, 16);
        b.token_ids = vec![1, 2, 3, 4];
        (b.feedback[0], b.feedback[2]) = (true, true);
        let mut batch = self.backend.batch(4, 4, 1).expect("batch");
        self.backend.set_batch(&mut batch, &b).expect("set_batch");
        self.backend.feed_back(&mut batch, &sampler).expect("feed_back");
        let mut x = self.tensor(4, W, &[]);
        self.backend.embed(&wt, &batch, &mut x).expect("embed");
        let got = self.read(&x, 4);
        let id = |t: u32| (t % 128) as f32;
        assert_eq!(
            [got[0], got[W], got[2 * W], got[3 * W]],
            [id(together[7][3]), id(2), id(3), id(together[7][2])],
            "feed_back"
        );
    }
}
