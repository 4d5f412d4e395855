//! Instruction sets, and the scalar maths that loops over rows are made of.
//!
//! Loops are written once over plain slices; [`versions!`] compiles them for each instruction set and chooses at run time.

use crate::backend::DType;

/// What the kernels may use; each level includes the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    Portable,
    /// AVX2, FMA, F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// The same with BF16 dot products.
    Avx512Bf16,
}

impl Isa {
    /// The best level of this machine.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            match (avx2, avx512, is_x86_feature_detected!("avx512bf16")) {
                (true, true, true) => return Isa::Avx512Bf16,
                (true, true, false) => return Isa::Avx512,
                (true, false, _) => return Isa::Avx2,
                (false, ..) => {}
            }
        }
        Isa::Portable
    }

    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2+fma",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512+bf16",
        }
    }
}

/// `versions!(fn name(args) = body)` makes `name(isa, args)` out of an `#[inline(always)] fn body::<const FMA: bool>(args)`.
///
/// `FMA` says whether [`fma`] may fuse: without the instruction `mul_add` would be a slow library call.
macro_rules! versions {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$t:ident: $bound:path>)? ($($arg:ident: $ty:ty),* $(,)?) = $body:ident) => {
        $(#[$meta])*
        $vis fn $name $(<$t: $bound>)? (isa: $crate::backend::cpu::simd::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                use $crate::backend::cpu::simd::Isa;
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                fn avx512 $(<$t: $bound>)? ($($arg: $ty),*) {
                    $body::<true $(, $t)?>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2 $(<$t: $bound>)? ($($arg: $ty),*) {
                    $body::<true $(, $t)?>($($arg),*)
                }
                // SAFETY: an `Isa` above `Portable` exists only where its features were detected.
                unsafe {
                    match isa {
                        Isa::Avx512 | Isa::Avx512Bf16 => return avx512 $(::<$t>)? ($($arg),*),
                        Isa::Avx2 => return avx2 $(::<$t>)? ($($arg),*),
                        Isa::Portable => {}
                    }
                }
            }
            let _ = isa;
            $body::<false $(, $t)?>($($arg),*)
        }
    };
}
pub(super) use versions;

/// `a · b + c`, rounded once with `FMA`.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// e^x within 2 ulp; 0 below −87.3, infinity above 88.7, NaN for NaN. Branch-free, so that loops over it vectorise.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    // x = n ln 2 + r, |r| ≤ ln 2 / 2; ln 2 in two parts so that r is exact. Taylor to r^7: error below 2^-26.
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23: adding it rounds to an integer
    let clamped = x.clamp(-87.3, 88.7);
    let shifted = fma::<FMA>(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -0.693_145_75, clamped);
    let r = fma::<FMA>(n, -1.428_606_8e-6, r);
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = fma::<FMA>(p, r, c);
    }
    // 2^n in two factors: n reaches 128, one past the largest exponent.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let pow2 = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
    let y = p * pow2(half) * pow2(n - half);
    let y = if x < -87.3 { 0.0 } else { y };
    let y = if x > 88.7 { f32::INFINITY } else { y };
    if x.is_nan() { x } else { y }
}

#[inline(always)]
pub fn silu<const FMA: bool>(x: f32) -> f32 {
    x / (1.0 + exp::<FMA>(-x))
}

/// A storage type of weights or KV.
pub trait Element: super::buffer::Plain {
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn from_f32(x: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}

/// Bits of a bfloat16.
#[derive(Clone, Copy, PartialEq, Debug)]
#[repr(transparent)]
pub struct Bf16(pub u16);
// SAFETY: transparent over u16.
unsafe impl super::buffer::Plain for Bf16 {}

impl Element for Bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        // Rounding could carry a NaN into infinity: keep it quiet instead.
        Bf16(if x.is_nan() { bits >> 16 | 0x40 } else { rounded } as u16)
    }
}

/// Bits of an IEEE half.
#[derive(Clone, Copy, PartialEq, Debug)]
#[repr(transparent)]
pub struct F16(pub u16);
// SAFETY: transparent over u16.
unsafe impl super::buffer::Plain for F16 {}

impl Element for F16 {
    /// Branch-free: the exponent is rebased by a multiplication, which also scales subnormals right.
    #[inline(always)]
    fn to_f32(self) -> f32 {
        let h = u32::from(self.0);
        let magnitude = (h & 0x7fff) << 13;
        let scaled = f32::from_bits(magnitude) * f32::from_bits(239 << 23);
        let value = if h & 0x7c00 == 0x7c00 {
            magnitude | 0x7f80_0000
        } else {
            scaled.to_bits()
        };
        f32::from_bits(value | (h & 0x8000) << 16)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        F16(half::f16::from_f32(x).to_bits())
    }
}

/// Element `i` of row-major little-endian bytes.
#[inline(always)]
pub fn load(dtype: DType, data: &[u8], i: usize) -> f32 {
    match dtype {
        DType::F32 => f32::from_le_bytes([data[4 * i], data[4 * i + 1], data[4 * i + 2], data[4 * i + 3]]),
        DType::F16 => F16(u16::from_le_bytes([data[2 * i], data[2 * i + 1]])).to_f32(),
        DType::Bf16 => Bf16(u16::from_le_bytes([data[2 * i], data[2 * i + 1]])).to_f32(),
    }
}

/// `x` as it would be after a round trip through `dtype`.
pub fn round_to(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::F16 => F16::from_f32(x).to_f32(),
        DType::Bf16 => Bf16::from_f32(x).to_f32(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_and_saturates() {
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0 + 0.000_37;
            let want = f64::from(x).exp();
            for got in [exp::<true>(x), exp::<false>(x)] {
                let error = (f64::from(got) - want).abs() / want;
                assert!(error < 2.5e-7, "exp({x}) = {got}, not {want}");
            }
        }
        assert_eq!(exp::<true>(0.0), 1.0);
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<true>(-88.0), 0.0);
        assert_eq!(exp::<true>(f32::INFINITY), f32::INFINITY);
        assert!(exp::<true>(f32::NAN).is_nan());
        assert_eq!(silu::<true>(-1e4), 0.0);
        assert_eq!(silu::<true>(1e4), 1e4);
    }

    #[test]
    fn sixteen_bit_types_agree_with_half() {
        for bits in 0..=u16::MAX {
            let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
            assert!(
                same(F16(bits).to_f32(), half::f16::from_bits(bits).to_f32()),
                "f16 {bits:#x}"
            );
            assert!(
                same(Bf16(bits).to_f32(), half::bf16::from_bits(bits).to_f32()),
                "bf16 {bits:#x}"
            );
            let x = f32::from_bits(u32::from(bits) << 16 | 0x8000 | u32::from(bits & 1));
            assert!(
                same(Bf16::from_f32(x).to_f32(), half::bf16::from_f32(x).to_f32()),
                "{x}"
            );
        }
    }
}
