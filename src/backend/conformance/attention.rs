//! Head norms, rotary positions, the paged cache and attention, over every cut of the same sequences.

use super::*;

impl<B: Backend> Suite<'_, B> {
    pub(super) fn attention(&mut self) {
        const LENGTHS: [usize; 4] = [150, 1, 33, 300];
        let shape = |q, kv, d| AttentionShape {
            num_q_heads: q,
            num_kv_heads: kv,
            head_dim: d,
            scale: 1.0 / (d as f32).sqrt(),
            rope_theta: 1e6,
            norm_eps: 1e-5,
        };
        for (q, kv, d, block_size) in self.options.shapes.attentions.clone() {
            for kv_dtype in self.options.kv.clone() {
                self.attention_case(&shape(q, kv, d), block_size, kv_dtype, &LENGTHS);
                self.attention_of_long_rows(&shape(q, kv, d), block_size, kv_dtype);
            }
        }
    }

    fn attention_case(&mut self, shape: &AttentionShape, block_size: usize, kv_dtype: DType, lengths: &[usize]) {
        let (nq, nk, d) = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim);
        let what = format!("attention {nq}/{nk} heads of {d}, blocks of {block_size}, KV {kv_dtype}");
        let width = (nq + 2 * nk) * d;
        let (qw, kw) = (self.rng.values(d), self.rng.values(d));
        let (qt, kt) = (
            self.weight(&[d], &qw, self.options.vectors),
            self.weight(&[d], &kw, self.options.vectors),
        );
        let inputs: Vec<Vec<f32>> = lengths.iter().map(|n| self.rng.values(n * width)).collect();
        let wants: Vec<Vec<f64>> = inputs
            .iter()
            .map(|x| reference_attention(x, &qw, &kw, shape, kv_dtype, 0))
            .collect();
        let blocks = lengths.iter().max().map_or(1, |n| n.div_ceil(block_size));
        let mut kv = self
            .backend
            .kv_cache(blocks * lengths.len(), block_size, shape, kv_dtype)
            .expect("kv_cache");
        let mut first: Option<Vec<Vec<f32>>> = None;
        let both = schedules(lengths)
            .into_iter()
            .flat_map(|steps| [(steps.clone(), false), (steps, true)]);
        for (steps, fused) in both {
            let mut outs: Vec<Vec<f32>> = vec![Vec::new(); lengths.len()];
            for step in &steps {
                let got = self.attention_step(
                    step,
                    &inputs,
                    &qt,
                    &kt,
                    shape,
                    lengths.len(),
                    blocks,
                    block_size,
                    &mut kv,
                    fused,
                );
                let mut at = 0;
                for p in step {
                    outs[p.sequence].extend(&got[at..at + p.len * nq * d]);
                    at += p.len * nq * d;
                }
            }
            for (got, want) in outs.iter().zip(&wants) {
                let options = Options {
                    tolerance: self.attention_tolerance(kv_dtype),
                    ..self.options.clone()
                };
                Suite {
                    backend: &mut *self.backend,
                    options: &options,
                    rng: Rng(0),
                }
                .close(&what, got, want, nq * d);
            }
            match &first {
                None => first = Some(outs),
                Some(first) => first.iter().zip(&outs).for_each(|(a, b)| self.same(&what, b, a)),
            }
        }
        // A replay reads the cache and writes none: with spoilt k and v in the replayed tokens the rest is unchanged.
        let Some(first) = first else { return };
        let (start, len, replay) = (100, 50, 12);
        let mut spoilt = inputs.clone();
        for t in start..start + replay {
            spoilt[0][t * width + nq * d..(t + 1) * width].fill(3.0);
        }
        let step = [
            Piece {
                sequence: 0,
                start,
                len,
                replay,
                reset: true,
            },
            piece(1, 0, 1),
        ];
        let got = self.attention_step(
            &step,
            &spoilt,
            &qt,
            &kt,
            shape,
            lengths.len(),
            blocks,
            block_size,
            &mut kv,
            false,
        );
        let want = &first[0][start * nq * d..(start + len) * nq * d];
        self.same(&format!("{what}, replay"), &got[..len * nq * d], want);
    }

    /// Two decode steps of rows with contexts of one token to several hundred.
    fn attention_of_long_rows(&mut self, shape: &AttentionShape, block_size: usize, kv_dtype: DType) {
        const LENGTHS: [usize; 6] = [257, 702, 66, 2, 514, 321];
        let (nq, nk, d) = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim);
        let width = (nq + 2 * nk) * d;
        let (qw, kw) = (self.rng.values(d), self.rng.values(d));
        let (qt, kt) = (
            self.weight(&[d], &qw, self.options.vectors),
            self.weight(&[d], &kw, self.options.vectors),
        );
        let inputs: Vec<Vec<f32>> = LENGTHS.iter().map(|n| self.rng.values(n * width)).collect();
        let blocks = 702usize.div_ceil(block_size);
        let mut kv = self
            .backend
            .kv_cache(blocks * LENGTHS.len(), block_size, shape, kv_dtype)
            .expect("kv_cache");
        for fused in [false, true] {
            let prompt: Vec<Piece> = LENGTHS
                .iter()
                .enumerate()
                .filter(|(_, n)| **n > 2)
                .map(|(s, n)| piece(s, 0, n - 2))
                .collect();
            self.attention_step(&prompt, &inputs, &qt, &kt, shape, 6, blocks, block_size, &mut kv, fused);
            for back in [2, 1] {
                let step: Vec<Piece> = LENGTHS.iter().enumerate().map(|(s, n)| piece(s, n - back, 1)).collect();
                let got = self.attention_step(&step, &inputs, &qt, &kt, shape, 6, blocks, block_size, &mut kv, fused);
                for (s, n) in LENGTHS.into_iter().enumerate() {
                    let seen = &inputs[s][..(n + 1 - back) * width];
                    let want = reference_attention(seen, &qw, &kw, shape, kv_dtype, n - back);
                    let what = format!(
                        "attention of a row of {}, {nq}/{nk} heads of {d}, blocks of {block_size}, KV {kv_dtype}, fused {fused}",
                        n + 1 - back
                    );
                    let options = Options {
                        tolerance: self.attention_tolerance(kv_dtype),
                        ..self.options.clone()
                    };
                    Suite {
                        backend: &mut *self.backend,
                        options: &options,
                        rng: Rng(0),
                    }
                    .close(&what, &got[s * nq * d..(s + 1) * nq * d], &want, nq * d);
                }
            }
        }
    }

    /// 16-bit KV rounds values that differ in the last bit of f32 differently now and then.
    fn attention_tolerance(&self, kv_dtype: DType) -> f64 {
        match kv_dtype {
            DType::F32 => self.options.tolerance,
            _ => (self.options.tolerance * 50.0).min(3e-2).max(self.options.tolerance),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one step's operands")]
    fn attention_step(
        &mut self,
        step: &[Piece],
        inputs: &[Vec<f32>],
        q_norm: &B::Weight,
        k_norm: &B::Weight,
        shape: &AttentionShape,
        sequences: usize,
        blocks: usize,
        block_size: usize,
        kv: &mut B::KvCache,
        fused: bool,
    ) -> Vec<f32> {
        let width = (shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim;
        let b = layout(step, sequences, blocks, block_size);
        let tokens = b.num_tokens();
        let mut batch = self.backend.batch(tokens, step.len(), blocks).expect("batch");
        self.backend.set_batch(&mut batch, &b).expect("set_batch");
        let x: Vec<f32> = step
            .iter()
            .flat_map(|p| inputs[p.sequence][p.start * width..(p.start + p.len) * width].to_vec())
            .collect();
        let mut qkv = self.tensor(tokens, width, &x);
        let mut out = self.tensor(tokens, shape.num_q_heads * shape.head_dim, &[]);
        if fused {
            self.backend
                .qk_norm_rope_attention(&mut qkv, q_norm, k_norm, shape, &batch, kv, &mut out)
                .expect("qk_norm_rope_attention");
            return self.read(&out, tokens);
        }
        self.backend
            .qk_norm_rope_kv(&mut qkv, q_norm, k_norm, shape, &batch, kv)
            .expect("qk_norm_rope_kv");
        self.backend
            .attention(&qkv, shape, &batch, kv, &mut out)
            .expect("attention");
        self.read(&out, tokens)
    }
}

/// Causal attention over a whole sequence, `[n, (Nq + 2 Nk) D]` → `[n, Nq D]`.
/// `from`: the first token whose result is wanted.
fn reference_attention(
    qkv: &[f32],
    qw: &[f32],
    kw: &[f32],
    shape: &AttentionShape,
    kv_dtype: DType,
    from: usize,
) -> Vec<f64> {
    let (nq, nk, d) = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim);
    let width = (nq + 2 * nk) * d;
    let n = qkv.len() / width;
    let head = |t: usize, index: usize, weight: &[f32]| -> Vec<f64> {
        let x: Vec<f64> = qkv[t * width + index * d..][..d]
            .iter()
            .map(|&v| f64::from(v))
            .collect();
        let scale = 1.0 / (x.iter().map(|v| v * v).sum::<f64>() / d as f64 + f64::from(shape.norm_eps)).sqrt();
        let x: Vec<f64> = x.iter().zip(weight).map(|(v, &w)| v * scale * f64::from(w)).collect();
        let mut y = vec![0.0; d];
        for j in 0..d / 2 {
            let angle = t as f64 / shape.rope_theta.powf(2.0 * j as f64 / d as f64);
            y[j] = x[j] * angle.cos() - x[j + d / 2] * angle.sin();
            y[j + d / 2] = x[j + d / 2] * angle.cos() + x[j] * angle.sin();
        }
        y
    };
    let stored = |x: f64| f64::from(round(kv_dtype, x as f32));
    let k: Vec<Vec<Vec<f64>>> = (0..n)
        .map(|t| {
            (0..nk)
                .map(|h| head(t, nq + h, kw).into_iter().map(stored).collect())
                .collect()
        })
        .collect();
    let mut out = Vec::with_capacity((n - from) * nq * d);
    for t in from..n {
        for h in 0..nq {
            let q = head(t, h, qw);
            let group = h / (nq / nk);
            let score = |s: usize| q.iter().zip(&k[s][group]).map(|(a, b)| a * b).sum::<f64>() * f64::from(shape.scale);
            let scores: Vec<f64> = (0..=t).map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            for j in 0..d {
                let v = |s: usize| stored(f64::from(qkv[s * width + (nq + nk + group) * d + j]));
                out.push(weights.iter().enumerate().map(|(s, w)| w * v(s)).sum::<f64>() / total);
            }
        }
    }
    out
}
