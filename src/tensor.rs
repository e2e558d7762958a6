//! Views of arrays the engine does not own, and the slot buffers it does.
//!
//! They are addresses with lengths: only the executors dereference them, for the time of one sweep or copy.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::any::Any;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::{MmapMut, MmapRaw};

use crate::error::{Error, ErrorKind, Result};
use crate::real::{Dtype, Real};
use crate::room;

/// Shape and strides of an array that is not in C order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Strides {
    /// Extent of each axis.
    pub shape: Vec<usize>,
    /// Bytes from one element to the next along each axis; may be negative.
    pub bytes: Vec<isize>,
}

/// Address, element count and layout of an array; elements are counted in C order of its shape.
#[derive(Debug, Clone)]
pub struct RawTensor {
    /// First element (of index 0, 0, …).
    pub ptr: *mut u8,
    /// Elements; of complex arrays, real numbers.
    pub len: usize,
    /// What it stores; of complex arrays, the parts.
    pub dtype: Dtype,
    /// `None` in C order.
    pub strides: Option<Arc<Strides>>,
}

// SAFETY: a RawTensor is an address; every dereference is in cpu::memory, whose callers own the duties.
unsafe impl Send for RawTensor {}
// SAFETY: as above.
unsafe impl Sync for RawTensor {}

/// Rows of an array that a sparse gradient touches: different ones, ascending.
///
/// The array is taken as a matrix of `width` columns; its rows are all elements with the same index along
/// the axes that the gradient is sparse in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rows {
    index: Vec<usize>,
    width: usize,
}

impl Rows {
    /// Rows of an array of `total` rows of `width` elements; `None` unless they ascend below `total`.
    pub fn new(index: Vec<usize>, width: usize, total: usize) -> Option<Self> {
        let ascending = index.windows(2).all(|pair| pair[0] < pair[1]);
        let inside = index.last().is_none_or(|&last| last < total && total.checked_mul(width).is_some());
        (ascending && inside).then_some(Self { index, width })
    }

    /// Elements of all of them.
    pub fn len(&self) -> usize {
        self.index.len() * self.width
    }

    /// Whether they have no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `visit(i, at)` with the number i of each of these elements and its place in the array.
    pub(crate) fn walk(&self, start: usize, n: usize, mut visit: impl FnMut(usize, usize)) {
        let (mut row, mut column) = (start / self.width.max(1), start % self.width.max(1));
        for i in 0..n {
            visit(i, self.index[row] * self.width + column);
            column += 1;
            if column == self.width {
                (row, column) = (row + 1, 0);
            }
        }
    }

    /// One past the largest place of an element in the array.
    pub(crate) fn end(&self) -> usize {
        self.index.last().map_or(0, |last| (last + 1) * self.width)
    }
}

/// An array that a step may write: a parameter.
#[derive(Debug)]
pub struct TensorMut<'a> {
    pub(crate) raw: RawTensor,
    life: PhantomData<&'a mut [u8]>,
}

/// An array that a step only reads: a gradient.
#[derive(Debug, Clone)]
pub struct TensorRef<'a> {
    pub(crate) raw: RawTensor,
    pub(crate) rows: Option<Arc<Rows>>,
    /// What only the executor of a device knows, where the array lies on that; without an address then.
    pub(crate) on_device: Option<Arc<dyn Any + Send + Sync>>,
    life: PhantomData<&'a [u8]>,
}

impl TensorMut<'_> {
    /// # Safety
    /// For the life of the value `raw` must describe allocated, aligned, writable memory that no Rust
    /// reference covers and that overlaps no other tensor given to the same call.
    pub unsafe fn from_raw(raw: RawTensor) -> Self {
        Self { raw, life: PhantomData }
    }

    /// The same array, to read.
    pub(crate) fn reading(&self) -> TensorRef<'_> {
        TensorRef { raw: self.raw.clone(), rows: None, on_device: None, life: PhantomData }
    }
}

impl TensorRef<'_> {
    /// Where it lies.
    pub fn raw(&self) -> &RawTensor {
        &self.raw
    }

    /// Brings it to another array of the same length; whether it is in C order and of that dtype, which is needed.
    ///
    /// # Safety
    /// As for [`TensorRef::from_raw`], of the array at that address.
    pub unsafe fn move_to(&mut self, address: *mut u8, dtype: Dtype) -> bool {
        let fits =
            self.raw.dtype == dtype && self.raw.strides.is_none() && self.rows.is_none() && self.on_device.is_none();
        if fits {
            self.raw.ptr = address;
        }
        fits
    }

    /// # Safety
    /// For the life of the value `raw` must describe allocated, aligned, initialized memory that overlaps
    /// no tensor written by the same call.
    pub unsafe fn from_raw(raw: RawTensor) -> Self {
        Self { raw, rows: None, on_device: None, life: PhantomData }
    }

    /// An array on a device: only that device's executor can read it.
    #[cfg(feature = "gpu")]
    pub(crate) fn on_device(len: usize, dtype: Dtype, array: Arc<dyn Any + Send + Sync>) -> Self {
        let raw = RawTensor { ptr: std::ptr::null_mut(), len, dtype, strides: None };
        Self { raw, rows: None, on_device: Some(array), life: PhantomData }
    }

    /// Elements; of complex arrays, real numbers.
    pub fn len(&self) -> usize {
        self.raw.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.raw.len == 0
    }

    /// Says that these are the values of some rows of a gradient that is zero elsewhere.
    #[must_use]
    pub fn of_rows(self, rows: impl Into<Arc<Rows>>) -> Self {
        Self { rows: Some(rows.into()), ..self }
    }
}

impl<'a, F: Real> From<&'a mut [F]> for TensorMut<'a> {
    fn from(slice: &'a mut [F]) -> Self {
        let raw = RawTensor { ptr: slice.as_mut_ptr().cast(), len: slice.len(), dtype: F::DTYPE, strides: None };
        Self { raw, life: PhantomData }
    }
}

impl<'a, F: Real> From<&'a [F]> for TensorRef<'a> {
    fn from(slice: &'a [F]) -> Self {
        let raw = RawTensor { ptr: slice.as_ptr().cast_mut().cast(), len: slice.len(), dtype: F::DTYPE, strides: None };
        Self { raw, rows: None, on_device: None, life: PhantomData }
    }
}

/// One slot of one parameter: zeroed memory, aligned to a cache line, that never moves.
///
/// Shared (`Arc`) between the store and whatever array views the binding hands out. Large ones are mapped: the system
/// zeroes a page when it is first touched, by the thread that works on it, and where it can it gives huge pages.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    /// Bytes before the first element.
    start: usize,
    len: usize,
    dtype: Dtype,
}

/// Where in a page a large buffer begins: a processor takes a load for one of what it is just storing if their places in
/// a page are the same, and waits, so that loops over arrays which all begin alike run slower by a third.
fn next_start() -> usize {
    const STARTS: usize = 7;
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    (1 + NEXT.fetch_add(1, Ordering::Relaxed) % STARTS) * Buffer::PAGE / (STARTS + 1)
}

#[derive(Debug)]
enum Memory {
    Allocated { ptr: NonNull<u8>, layout: Layout },
    Mapped(MmapRaw),
}

// SAFETY: the buffer owns its memory; reads and writes go through raw pointers in cpu::memory.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    const ALIGN: usize = 64;
    const PAGE: usize = 4096;
    /// Two huge pages of most machines, so that one at least is whole.
    const MAPPED_FROM_BYTES: usize = 4 << 20;

    /// `len` zeros.
    pub fn zeroed(len: usize, dtype: Dtype) -> Result<Self> {
        let refuse = || {
            Error::plain(
                ErrorKind::OutOfMemory,
                format!("roptim: optimizer state of {len} {dtype} elements could not be allocated"),
            )
        };
        let bytes = len.checked_mul(dtype.size()).ok_or_else(refuse)?.max(1);
        let start = if bytes >= Self::PAGE { next_start() } else { 0 };
        let bytes = bytes.checked_add(start).ok_or_else(refuse)?;
        let layout = Layout::from_size_align(bytes, Self::ALIGN).map_err(|_| refuse())?;
        let memory = if bytes >= Self::MAPPED_FROM_BYTES {
            let map = MmapMut::map_anon(bytes).map_err(|_| refuse())?;
            // A wish: without huge pages everything works.
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage);
            Memory::Mapped(map.into())
        } else {
            // SAFETY: the layout's size is at least 1.
            let ptr = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refuse)?;
            Memory::Allocated { ptr, layout }
        };
        Ok(Self { memory, start, len, dtype })
    }

    fn ptr(&self) -> *mut u8 {
        let memory = match &self.memory {
            Memory::Allocated { ptr, .. } => ptr.as_ptr(),
            Memory::Mapped(map) => map.as_mut_ptr(),
        };
        memory.wrapping_add(self.start)
    }

    /// As a tensor in C order.
    pub fn raw(&self) -> RawTensor {
        RawTensor { ptr: self.ptr(), len: self.len, dtype: self.dtype, strides: None }
    }

    /// A copy of the bytes in the machine's order, little-endian on every supported one.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        let len = self.len * self.dtype.size();
        let mut bytes = Vec::new();
        room::reserve(&mut bytes, len, "a copy of optimizer state")?;
        // SAFETY: the list has room for the buffer's bytes, which then are all initialized; they have different owners. A
        // concurrent writer (an array view in another thread) may tear values, as it may for any NumPy array.
        unsafe {
            std::ptr::copy_nonoverlapping(self.ptr(), bytes.as_mut_ptr(), len);
            bytes.set_len(len);
        }
        Ok(bytes)
    }

    /// Overwrites the whole buffer. The length must fit.
    pub(crate) fn copy_from(&self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.len * self.dtype.size());
        // SAFETY: lengths agree (asserted), the regions belong to different owners.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.ptr(), bytes.len()) };
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Memory::Allocated { ptr, layout } = self.memory {
            // SAFETY: allocated in `zeroed` with this layout, freed once.
            unsafe { dealloc(ptr.as_ptr(), layout) };
        }
    }
}
