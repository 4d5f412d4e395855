//! Fused operations against the plain ones they are made of, which the rest of the suite checks.

use super::*;
use crate::backend::ConvWeights;

impl<B: Backend> Suite<'_, B> {
    pub(super) fn fused(&mut self) {
        for (h, f, experts, k) in self.options.shapes.fused.clone() {
            for dtype in self.options.weights.clone() {
                for rows in self.options.rows.clone().into_iter().filter(|&rows| rows <= 130) {
                    self.fused_products(rows, h, f, dtype);
                    self.fused_conv(rows, h, dtype);
                }
                let shape = RouteShape {
                    num_experts: experts,
                    experts_per_token: k,
                    norm_topk_prob: true,
                    routed_scaling_factor: 1.0,
                };
                self.fused_experts(&shape, h, f, dtype);
            }
        }
    }

    fn norm_weight(&mut self, h: usize) -> B::Weight {
        let values: Vec<f32> = self.rng.values(h).iter().map(|v| 1.0 + v * 0.5).collect();
        self.weight(&[h], &values, self.options.vectors)
    }

    fn matrix(&mut self, rows: usize, cols: usize, dtype: DType) -> B::Weight {
        let values = self.rng.values(rows * cols);
        self.weight(&[rows, cols], &values, dtype)
    }

    fn near(&self, what: &str, got: &[f32], want: &[f32], cols: usize) {
        let want: Vec<f64> = want.iter().map(|&v| f64::from(v)).collect();
        self.close(what, got, &want, cols);
    }

    /// A norm read by products, a product into the residual, SwiGLU, and the rows of a decode step's logits.
    fn fused_products(&mut self, rows: usize, h: usize, f: usize, dtype: DType) {
        let what = |op: &str| format!("{op}, {rows} rows of {h}, {f} wide, {dtype}");
        let eps = 1e-5;
        let x = self.rng.values(rows * h);
        let norm = self.norm_weight(h);
        let (w13, w2) = (self.matrix(2 * f, h, dtype), self.matrix(h, f, dtype));
        let bias = self.rng.values(h);
        let bias = self.weight(&[h], &bias, dtype);

        let xt = self.tensor(rows, h, &x);
        let mut plain = self.tensor(rows, h, &[]);
        self.backend
            .rms_norm(&xt, rows, &norm, eps, &mut plain)
            .expect("rms_norm");
        let normed = self.read(&plain, rows);
        let stored = self.tensor(rows, h, &normed);
        let (mut gate_up, mut act, mut out) = (
            self.tensor(rows, 2 * f, &[]),
            self.tensor(rows, f, &[]),
            self.tensor(rows, h, &[]),
        );
        self.backend
            .linear(&stored, rows, &w13, None, &mut gate_up)
            .expect("linear");
        let want_product = self.read(&gate_up, rows);
        self.backend.swiglu(&gate_up, rows, &mut act).expect("swiglu");
        let want_act = self.read(&act, rows);
        self.backend
            .linear(&act, rows, &w2, Some(&bias), &mut out)
            .expect("linear");
        let want_sum: Vec<f32> = self.read(&out, rows).iter().zip(&x).map(|(a, b)| a + b).collect();

        let mut lazy = self.tensor(rows, h, &[]);
        self.backend
            .rms_norm(&xt, rows, &norm, eps, &mut lazy)
            .expect("rms_norm");
        self.backend
            .linear(&lazy, rows, &w13, None, &mut gate_up)
            .expect("linear");
        let got = self.read(&gate_up, rows);
        self.near(&what("rms_norm, linear"), &got, &want_product, 2 * f);

        let mut b = layout(&(0..rows).map(|s| piece(s, 0, 1)).collect::<Vec<_>>(), rows, 1, 16);
        b.token_ids.fill(0);
        let mut batch = self.backend.batch(rows, rows, 1).expect("batch");
        self.backend.set_batch(&mut batch, &b).expect("set_batch");
        let mut picked = self.tensor(rows, h, &[]);
        let mut logits = self.backend.tensor(rows, 2 * f, DType::F32).expect("tensor");
        self.backend
            .rms_norm(&xt, rows, &norm, eps, &mut lazy)
            .expect("rms_norm");
        self.backend
            .gather_logit_rows(&lazy, &batch, &mut picked)
            .expect("gather_logit_rows");
        self.backend
            .linear(&picked, rows, &w13, None, &mut logits)
            .expect("linear");
        let got = self.read(&logits, rows);
        self.near(&what("rms_norm, gather_logit_rows, linear"), &got, &want_product, 2 * f);

        self.backend
            .rms_norm(&xt, rows, &norm, eps, &mut lazy)
            .expect("rms_norm");
        self.backend
            .linear_swiglu(&lazy, rows, &w13, &mut gate_up, &mut act)
            .expect("linear_swiglu");
        let got = self.read(&act, rows);
        self.near(&what("rms_norm, linear_swiglu"), &got, &want_act, f);

        let act = self.tensor(rows, f, &want_act);
        let mut residual = self.tensor(rows, h, &x);
        self.backend
            .linear_residual(&act, rows, &w2, Some(&bias), &mut residual, &mut out)
            .expect("linear_residual");
        self.backend
            .add_rms_norm(&mut residual, &out, rows, &norm, eps, &mut lazy)
            .expect("add_rms_norm");
        let sum = self.read(&residual, rows);
        self.near(&what("linear_residual"), &sum, &want_sum, h);
        let got = self.read(&lazy, rows);
        self.backend
            .rms_norm(&residual, rows, &norm, eps, &mut plain)
            .expect("rms_norm");
        let want = self.read(&plain, rows);
        self.near(&what("linear_residual, add_rms_norm"), &got, &want, h);
    }

    /// Three decode steps of a short convolution; in the second a row starts anew and the last is padding.
    fn fused_conv(&mut self, rows: usize, h: usize, dtype: DType) {
        let taps = 3;
        let what = format!("linear_short_conv, {rows} rows of {h}, {dtype}");
        let in_proj = self.matrix(3 * h, h, dtype);
        let (in_bias, bias) = (self.rng.values(3 * h), self.rng.values(h));
        let (in_bias, bias) = (self.weight(&[3 * h], &in_bias, dtype), self.weight(&[h], &bias, dtype));
        let tap_values = self.rng.values(h * taps);
        let taps_weight = self.weight(&[h, 1, taps], &tap_values, self.options.vectors);
        let with_bias = self.options.vectors == dtype;
        let (in_bias, taps_bias) = (with_bias.then_some(&in_bias), with_bias.then_some(&bias));
        let mut states = [
            self.backend.conv_state(rows, taps, h).expect("conv_state"),
            self.backend.conv_state(rows, taps, h).expect("conv_state"),
        ];
        for step in 0..3 {
            let pieces: Vec<Piece> = (0..rows).map(|s| piece(s, step, 1)).collect();
            let mut b = layout(&pieces, rows, 1, 16);
            if step == 1 {
                b.reset_conv[0] = true;
                if rows > 1 {
                    b.slots[rows - 1] = crate::backend::PADDING_SLOT;
                    b.slot_mapping[rows - 1] = -1;
                }
            }
            let real = if step == 1 && rows > 1 { rows - 1 } else { rows };
            let mut batch = self.backend.batch(rows, rows, 1).expect("batch");
            self.backend.set_batch(&mut batch, &b).expect("set_batch");
            // The product of three sums stays far below the largest float16.
            let x: Vec<f32> = self.rng.values(rows * h).iter().map(|v| v * 0.125).collect();
            let xt = self.tensor(rows, h, &x);
            let (mut bcx, mut want, mut got) = (
                self.tensor(rows, 3 * h, &[]),
                self.tensor(rows, h, &[]),
                self.tensor(rows, h, &[]),
            );
            self.backend
                .linear(&xt, rows, &in_proj, in_bias, &mut bcx)
                .expect("linear");
            self.backend
                .short_conv(&bcx, &taps_weight, taps_bias, &batch, &mut states[0], &mut want)
                .expect("short_conv");
            let weights = ConvWeights {
                in_proj: &in_proj,
                in_bias,
                taps: &taps_weight,
                taps_bias,
            };
            self.backend
                .linear_short_conv(&xt, rows, weights, &batch, &mut states[1], &mut bcx, &mut got)
                .expect("linear_short_conv");
            let (want, got) = (self.read(&want, real), self.read(&got, real));
            self.near(&format!("{what}, step {step}"), &got, &want, h);
        }
    }

    /// A norm read by the router, and experts into the residual.
    fn fused_experts(&mut self, shape: &RouteShape, h: usize, f: usize, dtype: DType) {
        let e = shape.num_experts;
        let most = self
            .options
            .rows
            .iter()
            .copied()
            .filter(|&rows| rows <= 130)
            .max()
            .unwrap_or(1);
        let gate = self.matrix(e, h, dtype);
        let norm = self.norm_weight(h);
        let values = bytes(dtype, &self.rng.values(2 * f * h));
        let (up, down) = ([2 * f, h], [h, f]);
        let size = dtype.size_bytes();
        // Experts differ in a rotation of the same values.
        let rotated: Vec<Vec<u8>> = (0..e)
            .map(|i| {
                let mut v = values.clone();
                v.rotate_left(i * 74 * size);
                v
            })
            .collect();
        let stack = |shape: &'static str, rotated: &'_ [Vec<u8>]| -> Vec<Vec<Vec<u8>>> {
            let n = if shape == "up" { 2 * f * h } else { f * h };
            rotated.iter().map(|v| vec![v[..n * size].to_vec()]).collect()
        };
        let (w13, w2) = (stack("up", &rotated), stack("down", &rotated));
        let mut experts = |parts: &[Vec<Vec<u8>>], shape: &[usize; 2]| {
            let parts: Vec<Vec<HostTensor<'_>>> = parts
                .iter()
                .map(|p| p.iter().map(|data| HostTensor { dtype, shape, data }).collect())
                .collect();
            self.backend.weight_experts(&parts, dtype).expect("weight_experts")
        };
        let (w13, w2) = (experts(&w13, &up), experts(&w2, &down));
        let mut routing = self.backend.routing(most, shape, h, f).expect("routing");
        for rows in self.options.rows.clone().into_iter().filter(|&rows| rows <= most) {
            let what =
                format!("rms_norm, moe_route, moe_experts_residual, {rows} rows, {e} experts of {h} × {f}, {dtype}");
            let x = self.rng.values(rows * h);
            let mut residual = self.tensor(rows, h, &x);
            let (mut normed, mut delta) = (self.tensor(rows, h, &[]), self.tensor(rows, h, &[]));
            self.backend
                .rms_norm(&residual, rows, &norm, 1e-5, &mut normed)
                .expect("rms_norm");
            self.backend
                .moe_route(&normed, rows, &gate, None, shape, &mut routing)
                .expect("moe_route");
            self.backend
                .moe_experts_residual(&normed, rows, &w13, &w2, &mut routing, &mut residual, &mut delta)
                .expect("moe_experts_residual");
            let mut out = self.tensor(rows, h, &[]);
            self.backend
                .add_rms_norm(&mut residual, &delta, rows, &norm, 1e-5, &mut out)
                .expect("add_rms_norm");
            let (sum, normed) = (self.read(&residual, rows), self.read(&normed, rows));

            let xt = self.tensor(rows, h, &x);
            let mut again = self.tensor(rows, h, &[]);
            self.backend
                .rms_norm(&xt, rows, &norm, 1e-5, &mut again)
                .expect("rms_norm");
            let again = self.read(&again, rows);
            self.near(&format!("{what}: the norm"), &normed, &again, h);
            // From the same rounded norms, so that no near tie between experts is decided otherwise.
            let xt = self.tensor(rows, h, &normed);
            self.backend
                .moe_route(&xt, rows, &gate, None, shape, &mut routing)
                .expect("moe_route");
            self.backend
                .moe_experts(&xt, rows, &w13, &w2, &mut routing, &mut delta)
                .expect("moe_experts");
            let want: Vec<f32> = self.read(&delta, rows).iter().zip(&x).map(|(a, b)| a + b).collect();
            self.near(&what, &sum, &want, h);
        }
    }
}
