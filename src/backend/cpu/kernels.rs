//! The innermost loops of matrix products: a tile of MR token rows × NR weight panels of 16 outputs.
//!
//! Every output is one chain over k in ascending order, whatever the tile, so a row's result depends neither on its
//! neighbours nor on how k or n were cut: a tile that continues a chain loads its exact f32 accumulators again.

#![expect(clippy::needless_range_loop, reason = "loops over constant-size register tiles")]

use super::simd::{self, Bf16, Element, F16, Isa};
use super::weight::PANEL;
use crate::backend::DType;

/// Most token rows of a tile.
pub const MAX_MR: usize = 6;
/// Most panels of a tile.
pub const MAX_NR: usize = 4;

/// Where accumulators start.
#[derive(Clone, Copy)]
pub enum Start {
    Zero,
    /// `[NR · 16]` readable up to the tile's valid columns.
    Bias(*const f32),
    /// The values in `out`.
    Continue,
}

/// One tile's operands; entries behind its MR and NR are not read.
#[derive(Clone, Copy)]
pub struct Tile {
    /// First k of each token row: bf16 pairs for [`Operand::Bf16`], else f32.
    pub x: [*const u8; MAX_MR],
    /// First k of each panel.
    pub w: [*const u8; MAX_NR],
    /// Number of k; even for bf16 weights unless the row ends here.
    pub k: usize,
    /// First column of each output row.
    pub out: [*mut f32; MAX_MR],
    pub start: Start,
    /// Valid columns of the last panel, 1..=16.
    pub last_columns: usize,
    /// Bytes ahead of the current weights to prefetch on each panel; 0 = none.
    pub prefetch_bytes: usize,
}

/// How a kernel wants the token rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    F32,
    /// Rounded to bf16, zero behind an odd K.
    Bf16,
}

type TileFn = unsafe fn(&Tile);

/// The kernel for a weight type on an instruction set.
#[derive(Clone, Copy)]
pub struct Kernel {
    pub name: &'static str,
    pub operand: Operand,
    /// Panels a tile may span: 1, 2 or 4 at most.
    pub max_nr: usize,
    /// `[MR - 1][log2 NR]`, without and with prefetches.
    tiles: [Tiles; 2],
}

type Tiles = [[TileFn; 3]; MAX_MR];

impl Kernel {
    pub fn choose(isa: Isa, dtype: DType) -> Self {
        #[cfg(target_arch = "x86_64")]
        match (isa, dtype) {
            (Isa::Avx512Bf16, DType::Bf16) => return avx512::BF16_DOT,
            (Isa::Avx512, DType::Bf16) => return avx512::BF16_WIDEN,
            (Isa::Avx512Bf16 | Isa::Avx512, DType::F16) => return avx512::F16_WIDEN,
            (Isa::Avx512Bf16 | Isa::Avx512, DType::F32) => return avx512::F32,
            (Isa::Avx2, DType::Bf16) => return avx2::BF16,
            (Isa::Avx2, DType::F16) => return avx2::F16_WIDEN,
            (Isa::Avx2, DType::F32) => return avx2::F32,
            (Isa::Portable, _) => {}
        }
        let _ = isa;
        match dtype {
            DType::Bf16 => portable::BF16,
            DType::F16 => portable::F16_WIDEN,
            DType::F32 => portable::F32,
        }
    }

    /// # Safety
    /// The tile's pointers are valid for its `k`, `mr` and `nr`; 1 ≤ mr ≤ 6; nr is 1, 2 or 4 and at most `max_nr`; the
    /// machine has the kernel's instructions.
    pub unsafe fn run(&self, mr: usize, nr: usize, tile: &Tile) {
        // SAFETY: the caller's promise.
        unsafe { self.tiles[usize::from(tile.prefetch_bytes > 0)][mr - 1][nr.trailing_zeros() as usize](tile) }
    }
}

/// A weight type in panels, 16 outputs at a time.
trait Panel {
    /// Adds k `0..k` of one panel to MR rows of accumulators.
    ///
    /// # Safety
    /// `x` rows and `w` hold k elements.
    unsafe fn accumulate<const FMA: bool, const MR: usize>(
        x: &[*const f32; MR],
        w: *const u8,
        k: usize,
        acc: &mut [[f32; PANEL]; MR],
    );
}

struct Plain<T>(std::marker::PhantomData<T>);

impl<T: Element> Panel for Plain<T> {
    #[inline(always)]
    unsafe fn accumulate<const FMA: bool, const MR: usize>(
        x: &[*const f32; MR],
        w: *const u8,
        k: usize,
        acc: &mut [[f32; PANEL]; MR],
    ) {
        for i in 0..k {
            // SAFETY: i < k.
            let row = unsafe { &*w.cast::<[T; PANEL]>().add(i) };
            for m in 0..MR {
                // SAFETY: as above.
                let xv = unsafe { *x[m].add(i) };
                for j in 0..PANEL {
                    acc[m][j] = simd::fma::<FMA>(xv, row[j].to_f32(), acc[m][j]);
                }
            }
        }
    }
}

struct Pairs;

impl Panel for Pairs {
    #[inline(always)]
    unsafe fn accumulate<const FMA: bool, const MR: usize>(
        x: &[*const f32; MR],
        w: *const u8,
        k: usize,
        acc: &mut [[f32; PANEL]; MR],
    ) {
        for pair in 0..k.div_ceil(2) {
            // SAFETY: the panel holds ⌈k/2⌉ pairs.
            let row = unsafe { &*w.cast::<[u32; PANEL]>().add(pair) };
            for m in 0..MR {
                // SAFETY: 2 pair < k.
                let xv = unsafe { *x[m].add(2 * pair) };
                for j in 0..PANEL {
                    acc[m][j] = simd::fma::<FMA>(xv, f32::from_bits(row[j] << 16), acc[m][j]);
                }
            }
            if 2 * pair + 1 < k {
                for m in 0..MR {
                    // SAFETY: 2 pair + 1 < k.
                    let xv = unsafe { *x[m].add(2 * pair + 1) };
                    for j in 0..PANEL {
                        acc[m][j] = simd::fma::<FMA>(xv, f32::from_bits(row[j] & 0xffff_0000), acc[m][j]);
                    }
                }
            }
        }
    }
}

/// The tile for plain Rust loops, compiled per instruction set.
#[inline(always)]
unsafe fn tile<const FMA: bool, const MR: usize, const NR: usize, P: Panel>(t: &Tile) {
    for n in 0..NR {
        let columns = if n + 1 == NR { t.last_columns } else { PANEL };
        let mut x = [std::ptr::null(); MR];
        let mut acc = [[0.0f32; PANEL]; MR];
        for m in 0..MR {
            x[m] = t.x[m].cast();
            let from = match t.start {
                Start::Zero => continue,
                Start::Bias(bias) => bias,
                Start::Continue => t.out[m].cast_const(),
            };
            // SAFETY: valid columns are readable.
            let from = unsafe { std::slice::from_raw_parts(from.add(n * PANEL), columns) };
            acc[m][..columns].copy_from_slice(from);
        }
        // SAFETY: the caller's promise.
        unsafe { P::accumulate::<FMA, MR>(&x, t.w[n], t.k, &mut acc) };
        for m in 0..MR {
            // SAFETY: valid columns are writable.
            let out = unsafe { std::slice::from_raw_parts_mut(t.out[m].add(n * PANEL), columns) };
            out.copy_from_slice(&acc[m][..columns]);
        }
    }
}

/// A table over MR and NR of one generic function.
macro_rules! tiles {
    ($f:ident) => {
        [tiles!($f, false), tiles!($f, true)]
    };
    ($f:ident, $p:literal) => {
        [
            [$f::<1, 1, $p>, $f::<1, 2, $p>, $f::<1, 4, $p>],
            [$f::<2, 1, $p>, $f::<2, 2, $p>, $f::<2, 4, $p>],
            [$f::<3, 1, $p>, $f::<3, 2, $p>, $f::<3, 4, $p>],
            [$f::<4, 1, $p>, $f::<4, 2, $p>, $f::<4, 4, $p>],
            [$f::<5, 1, $p>, $f::<5, 2, $p>, $f::<5, 4, $p>],
            [$f::<6, 1, $p>, $f::<6, 2, $p>, $f::<6, 4, $p>],
        ]
    };
}

/// A table for kernels that take one panel at a time.
macro_rules! narrow_tiles {
    ($f:ident, $t:ty) => {
        [[
            [$f::<1, 1, $t>; 3],
            [$f::<2, 1, $t>; 3],
            [$f::<3, 1, $t>; 3],
            [$f::<4, 1, $t>; 3],
            [$f::<5, 1, $t>; 3],
            [$f::<6, 1, $t>; 3],
        ]; 2]
    };
}

macro_rules! plain_kernels {
    ($f:ident, $bf16:literal, $f16:literal, $f32:literal) => {
        pub const BF16: Kernel = Kernel {
            name: $bf16,
            operand: Operand::F32,
            max_nr: 1,
            tiles: narrow_tiles!($f, Pairs),
        };
        pub const F16_WIDEN: Kernel = Kernel {
            name: $f16,
            operand: Operand::F32,
            max_nr: 1,
            tiles: narrow_tiles!($f, Plain<F16>),
        };
        pub const F32: Kernel = Kernel {
            name: $f32,
            operand: Operand::F32,
            max_nr: 1,
            tiles: narrow_tiles!($f, Plain<f32>),
        };
    };
}

mod portable {
    use super::*;

    unsafe fn run<const MR: usize, const NR: usize, P: Panel>(t: &Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile::<false, MR, NR, P>(t) }
    }
    plain_kernels!(run, "portable bf16→f32", "portable f16→f32", "portable f32");
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::*;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn run<const MR: usize, const NR: usize, P: Panel>(t: &Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile::<true, MR, NR, P>(t) }
    }
    plain_kernels!(run, "avx2 bf16→f32", "avx2 f16→f32", "avx2 f32");
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::*;

    /// `$load` turns the weights of one step into vectors, `$step` adds them to an accumulator.
    macro_rules! avx512_tile {
        ($name:ident, $features:literal, bytes $w_bytes:literal, k $k_step:literal, x $x:ty,
         zero $zero:expr, |$p:ident| $load:expr, |$acc:ident, $xv:ident, $wv:ident| $step:expr) => {
            #[target_feature(enable = $features)]
            unsafe fn $name<const MR: usize, const NR: usize, const PREFETCH: bool>(t: &Tile) {
                let mask = |n: usize| -> __mmask16 {
                    if n + 1 == NR {
                        (0xffff_u32 >> (PANEL - t.last_columns)) as __mmask16
                    } else {
                        0xffff
                    }
                };
                let mut acc = [[_mm512_setzero_ps(); NR]; MR];
                for m in 0..MR {
                    let from = match t.start {
                        Start::Zero => continue,
                        Start::Bias(bias) => bias,
                        Start::Continue => t.out[m].cast_const(),
                    };
                    for n in 0..NR {
                        // SAFETY: valid columns are readable.
                        acc[m][n] = unsafe { _mm512_maskz_loadu_ps(mask(n), from.add(n * PANEL)) };
                    }
                }
                let steps = t.k.div_ceil($k_step);
                for i in 0..steps {
                    let mut w = [$zero; NR];
                    for n in 0..NR {
                        // SAFETY: step i of panel n; a prefetch may point anywhere.
                        w[n] = unsafe {
                            let $p = t.w[n].add(i * $w_bytes);
                            if PREFETCH {
                                _mm_prefetch::<_MM_HINT_T0>($p.wrapping_add(t.prefetch_bytes).cast());
                            }
                            $load
                        };
                    }
                    for m in 0..MR {
                        // SAFETY: step i of row m.
                        let $xv = unsafe { t.x[m].cast::<$x>().add(i) };
                        for n in 0..NR {
                            let ($acc, $wv) = (acc[m][n], w[n]);
                            // SAFETY: reads step i of row m.
                            acc[m][n] = unsafe { $step };
                        }
                    }
                }
                for m in 0..MR {
                    for n in 0..NR {
                        // SAFETY: valid columns are writable.
                        unsafe { _mm512_mask_storeu_ps(t.out[m].add(n * PANEL), mask(n), acc[m][n]) };
                    }
                }
            }
        };
    }

    avx512_tile!(bf16_dot, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16", bytes 64, k 2, x i32,
    zero _mm512_setzero_si512(), |p| _mm512_loadu_si512(p.cast()),
    |acc, x, w| _mm512_dpbf16_ps(
        acc,
        std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(x.read_unaligned())),
        std::mem::transmute::<__m512i, __m512bh>(w),
    ));

    avx512_tile!(f16_widen, "avx512f,avx512bw,avx512dq,avx512vl", bytes 32, k 1, x f32,
        zero _mm512_setzero_ps(), |p| _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())),
        |acc, x, w| _mm512_fmadd_ps(_mm512_set1_ps(*x), w, acc));

    avx512_tile!(f32_wide, "avx512f,avx512bw,avx512dq,avx512vl", bytes 64, k 1, x f32,
        zero _mm512_setzero_ps(), |p| _mm512_loadu_ps(p.cast()),
        |acc, x, w| _mm512_fmadd_ps(_mm512_set1_ps(*x), w, acc));

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn bf16_widen<const MR: usize, const NR: usize, P: Panel>(t: &Tile) {
        // SAFETY: the caller's promise.
        unsafe { tile::<true, MR, NR, P>(t) }
    }

    pub const BF16_DOT: Kernel = Kernel {
        name: "avx512 vdpbf16ps",
        operand: Operand::Bf16,
        max_nr: 4,
        tiles: tiles!(bf16_dot),
    };
    pub const BF16_WIDEN: Kernel = Kernel {
        name: "avx512 bf16→f32",
        operand: Operand::F32,
        max_nr: 1,
        tiles: narrow_tiles!(bf16_widen, Pairs),
    };
    pub const F16_WIDEN: Kernel = Kernel {
        name: "avx512 f16→f32",
        operand: Operand::F32,
        max_nr: 4,
        tiles: tiles!(f16_widen),
    };
    pub const F32: Kernel = Kernel {
        name: "avx512 f32",
        operand: Operand::F32,
        max_nr: 4,
        tiles: tiles!(f32_wide),
    };
}

/// Rounds rows of f32 to bf16, each padded with a zero to an even length of `padded`.
#[inline(always)]
fn round_row_body<const FMA: bool>(x: &[f32], out: &mut [Bf16]) {
    for (o, &v) in out.iter_mut().zip(x) {
        *o = Bf16::from_f32(v);
    }
    if let Some(pad) = out.get_mut(x.len()) {
        *pad = Bf16(0);
    }
}

simd::versions! {
    /// One row of f32 as bf16; `out` is one longer if the row's length is odd.
    pub fn round_row(x: &[f32], out: &mut [Bf16]) = round_row_body
}
