//! Zeroed memory for tensors, weights and caches: page-aligned, committed on first touch, on huge pages where it is large.

use std::marker::PhantomData;

use memmap2::MmapMut;

use crate::backend::{BackendError, Result};

/// A fixed-size array of plain numbers. Every bit pattern of `T` must be a value (`f32`, `u16`, `u32`, …).
pub struct Buffer<T: Plain> {
    map: MmapMut,
    len: usize,
    of: PhantomData<T>,
}

/// Numbers without padding or invalid bit patterns.
///
/// # Safety
/// All-zero bytes and every other bit pattern must be a value, and the alignment at most a page.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}
// SAFETY: primitive numbers.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u8 {}

/// From this size on a buffer asks for huge pages: streaming gigabytes through 4 KB pages costs a tenth of the bandwidth.
const HUGE_BYTES: usize = 4 << 20;

impl<T: Plain> Buffer<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// The system has no memory left.
    pub fn zeroed(len: usize) -> Result<Self> {
        let fail = |message: String| BackendError {
            op: "allocate",
            message,
            fatal: false,
        };
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or_else(|| fail(format!("{len} elements do not fit in the address space")))?;
        let map = MmapMut::map_anon(bytes.max(1)).map_err(|e| fail(format!("{bytes} bytes: {e}")))?;
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_BYTES {
            // Advice only: kernels without transparent huge pages refuse it, and nothing but speed depends on it.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Self {
            map,
            len,
            of: PhantomData,
        })
    }

    pub fn as_slice(&self) -> &[T] {
        // SAFETY: the map is at least `len * size_of::<T>()` bytes, page-aligned, and any bits are a `T`.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.len) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().cast(), self.len) }
    }
}

impl<T: Plain> std::ops::Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        self.as_slice()
    }
}

impl<T: Plain> std::ops::DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.as_mut_slice()
    }
}
