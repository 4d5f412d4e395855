use proptest::prelude::*;

use super::*;

const INF: f32 = f32::INFINITY;

fn run(row: &[f32], params: &SamplingParams, output_index: u32) -> (TokenId, Option<TokenLogprobs>) {
    let history = History {
        output: &[],
        counts: None,
        output_index,
    };
    sample(Isa::detect(), row, params, &history, None, &mut Scratch::default())
}

fn kept(row: &[f32], params: &SamplingParams) -> Option<Vec<TokenId>> {
    let mut kept = Vec::new();
    let best = argmax(row).expect("a finite logit");
    filter(Isa::detect(), row, best, params, &mut kept).then(|| {
        let mut ids: Vec<TokenId> = kept.iter().map(|k| k.0).collect();
        ids.sort_unstable();
        ids
    })
}

#[test]
fn philox_matches_the_published_vectors() {
    assert_eq!(
        philox4x32([0; 4], [0; 2]),
        [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
    );
    assert_eq!(
        philox4x32([u32::MAX; 4], [u32::MAX; 2]),
        [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
    );
}

#[test]
fn draws_follow_the_softmax() {
    let probabilities = [0.4f64, 0.3, 0.15, 0.1, 0.04, 0.01];
    let temperature = 0.7;
    let row: Vec<f32> = probabilities
        .iter()
        .map(|p| (p.ln() * temperature + 3.0) as f32)
        .collect();
    let draws = 20_000;
    // Over output indices of one seed, over seeds at one index, and filtered down to the first three.
    for (mode, top_k) in [(0, 0), (1, 0), (1, 3)] {
        let mut counts = [0u32; 6];
        for i in 0..draws {
            let (seed, index) = if mode == 0 { (42, i) } else { (u64::from(i) << 20, 5) };
            let params = SamplingParams {
                temperature: temperature as f32,
                seed,
                top_k,
                ..Default::default()
            };
            counts[run(&row, &params, index).0 as usize] += 1;
        }
        let n = if top_k == 0 { 6 } else { top_k as usize };
        let total: f64 = probabilities[..n].iter().sum();
        let chi2: f64 = (0..n)
            .map(|i| {
                let expected = probabilities[i] / total * f64::from(draws);
                (f64::from(counts[i]) - expected).powi(2) / expected
            })
            .sum();
        // 5 degrees of freedom: 25.7 is passed once in 10,000 runs; the draws are fixed.
        assert!(chi2 < 25.7, "mode {mode}, top-k {top_k}: χ² = {chi2}, {counts:?}");
        assert!(counts[n..].iter().all(|&c| c == 0));
    }
}

#[test]
fn equal_logits_are_drawn_evenly_over_a_large_vocabulary() {
    let row = vec![1.0f32; 65_536];
    let mut halves = [0u32; 2];
    for i in 0..400 {
        halves[usize::from(
            run(
                &row,
                &SamplingParams {
                    seed: 3,
                    ..Default::default()
                },
                i,
            )
            .0 >= 32_768,
        )] += 1;
    }
    // Five standard deviations of a fair coin.
    assert!(halves[0].abs_diff(200) < 50, "{halves:?}");
}

#[test]
fn odd_rows_do_not_panic() {
    let hot = SamplingParams {
        logprobs: Some(3),
        top_k: 2,
        top_p: 0.5,
        min_p: 0.1,
        ..Default::default()
    };
    let greedy = SamplingParams {
        temperature: 0.0,
        logprobs: Some(3),
        ..Default::default()
    };
    for params in [&hot, &greedy, &SamplingParams::default()] {
        for mode in [
            LogprobsMode::RawLogprobs,
            LogprobsMode::ProcessedLogprobs,
            LogprobsMode::ProcessedLogits,
        ] {
            let params = SamplingParams {
                logprobs_mode: mode,
                ..params.clone()
            };
            assert_eq!(run(&[f32::NAN, 1.0, f32::NAN], &params, 0).0, 1);
            assert_eq!(run(&[f32::NAN; 40], &params, 0).0, 0);
            assert_eq!(run(&[-INF; 40], &params, 0).0, 0);
            assert_eq!(run(&[0.0, INF, 1.0], &params, 0).0, 1);
            assert_eq!(run(&[3.0], &params, 0).0, 0);
        }
    }
    assert_eq!(run(&[], &greedy, 0).0, 0);
}

#[test]
fn a_row_with_everything_forbidden_falls_back_to_the_model() {
    let params = SamplingParams {
        bad_words: vec![vec![1]],
        allowed_token_ids: Some(vec![1]),
        ..Default::default()
    };
    assert_eq!(run(&[0.0, 1.0, 2.0], &params, 0).0, 2);
}

#[test]
fn ids_outside_the_row_are_ignored() {
    let params = SamplingParams {
        temperature: 0.0,
        logit_bias: vec![(9, 100.0)],
        bad_words: vec![vec![77]],
        allowed_token_ids: Some(vec![1, 1000]),
        ..Default::default()
    };
    assert_eq!(run(&[5.0, 1.0], &params, 0).0, 1);
}

#[test]
fn ties_go_to_the_lower_id_at_every_length() {
    for n in [1usize, 15, 16, 17, 255, 256, 257, 1000] {
        let mut row = vec![0.0f32; n];
        assert_eq!(argmax(&row), Some(0));
        row[n - 1] = 1.0;
        assert_eq!(argmax(&row), Some(n as u32 - 1));
        row[n / 2] = 1.0;
        assert_eq!(argmax(&row), Some(n as u32 / 2));
    }
}

#[test]
fn penalties_are_those_of_vllm() {
    let params = SamplingParams {
        repetition_penalty: 2.0,
        frequency_penalty: 0.5,
        presence_penalty: 0.25,
        ..Default::default()
    };
    let counts = TokenCounts::new(&[0, 1], &[1, 2, 2]);
    let history = History {
        output: &[1, 2, 2],
        counts: Some(&counts),
        output_index: 3,
    };
    let mut row = [4.0, -4.0, 4.0, 4.0];
    adjust(&mut row, &params, &history, None, &mut Vec::new());
    // Prompt alone: repetition; prompt and output; output twice; never seen.
    assert_eq!(row, [2.0, -8.0 - 0.75, 2.0 - 1.25, 4.0]);
}

#[test]
fn the_order_of_steps_is_kept() {
    // Bias comes before the penalty (which doubles it) and cannot lift a forbidden token; the mask is last.
    let params = SamplingParams {
        repetition_penalty: 0.5,
        logit_bias: vec![(0, 1.0), (1, 50.0)],
        bad_words: vec![vec![1]],
        ..Default::default()
    };
    let counts = TokenCounts::new(&[0], &[]);
    let history = History {
        output: &[],
        counts: Some(&counts),
        output_index: 0,
    };
    let mut row = [1.0, 2.0, 3.0];
    adjust(
        &mut row,
        &params,
        &history,
        Some(&TokenMask(vec![0b011].into())),
        &mut Vec::new(),
    );
    assert_eq!(row, [4.0, -INF, -INF]);
}

#[test]
fn logprobs_count_ties_and_list_lower_ids_first() {
    let row = [1.0, 3.0, 3.0, 2.0, f32::NAN];
    let got = score(Isa::detect(), &row, 2, 3, &mut Scratch::default());
    assert_eq!((got.id, got.rank), (2, 2));
    assert_eq!(got.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 3]);
    let total = (2.0 * 3f64.exp() + 2f64.exp() + 1f64.exp()).ln();
    assert!((f64::from(got.logprob) - (3.0 - total)).abs() < 1e-6);
    assert_eq!(score(Isa::detect(), &row, 3, 0, &mut Scratch::default()).top, []);
}

#[test]
fn top_k_keeps_ties_at_its_edge() {
    let params = SamplingParams {
        top_k: 2,
        ..Default::default()
    };
    assert_eq!(kept(&[1.0, 5.0, 3.0, 3.0, 0.0], &params), Some(vec![1, 2, 3]));
    assert_eq!(kept(&[1.0, 5.0], &params), None);
}

proptest! {
    #[test]
    fn filters_keep_the_right_set(
        row in proptest::collection::vec(-40i32..40, 1..700),
        top_k in 0u32..100,
        top_p in 0.01f32..1.2,
        min_p in prop_oneof![Just(0.0f32), 0.001f32..1.0],
        temperature in 0.2f32..3.0,
    ) {
        let row: Vec<f32> = row.iter().map(|&x| x as f32 / 4.0 / temperature).collect();
        let params = SamplingParams { top_k, top_p: top_p.min(1.0), min_p, ..Default::default() };
        let max = row.iter().copied().fold(-INF, f32::max);
        // The plain definition, over a full sort.
        let mut order: Vec<u32> = (0..row.len() as u32).collect();
        order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]).then(a.cmp(&b)));
        let p = |id: u32| f64::from(row[id as usize] - max).exp();
        let k = top_k as usize;
        let kth = if k > 0 && k < row.len() { row[order[k - 1] as usize] } else { -INF };
        let pass: Vec<u32> =
            order.iter().copied().filter(|&id| row[id as usize] >= kth && p(id) >= f64::from(min_p) * 0.999_99).collect();
        let got = kept(&row, &params).unwrap_or_else(|| (0..row.len() as u32).collect());
        let total: f64 = pass.iter().map(|&id| p(id)).sum();
        // What is kept is a prefix of the order,
        let mut prefix = pass[..got.len().min(pass.len())].to_vec();
        prefix.sort_unstable();
        prop_assert_eq!(&got, &prefix);
        // just long enough.
        let mass: f64 = pass[..got.len()].iter().map(|&id| p(id)).sum();
        prop_assert!(mass >= f64::from(params.top_p) * total * (1.0 - 1e-5), "mass {} of {}", mass, total);
        if params.top_p < 1.0 {
            let less = mass - p(pass[got.len() - 1]);
            prop_assert!(less < f64::from(params.top_p) * total * (1.0 + 1e-5), "{} would do", less);
        }
    }

    #[test]
    fn the_sampled_token_is_always_a_kept_one(
        row in proptest::collection::vec(-8.0f32..8.0, 1..300),
        seed: u64,
        index in 0u32..1000,
        top_k in 0u32..20,
        top_p in 0.05f32..1.0,
    ) {
        let params = SamplingParams { seed, top_k, top_p, ..Default::default() };
        let id = run(&row, &params, index).0;
        prop_assert!(kept(&row, &params).is_none_or(|kept| kept.contains(&id)));
        prop_assert_eq!(run(&row, &params, index).0, id);
    }

    #[test]
    fn the_kth_largest_is_that_of_a_sort(row in proptest::collection::vec(-50i32..50, 1..2000), k in 1usize..50) {
        let row: Vec<f32> = row.iter().map(|&x| x as f32).collect();
        let mut sorted = row.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let want = sorted.get(k - 1).copied().unwrap_or(-INF);
        prop_assert_eq!(kth_largest(&row, k, -INF, &mut Vec::new()), want);
    }
}
