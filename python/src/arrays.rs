//! All knowledge of NumPy: the gate every array passes, its address and layout, overlap, and views of
//! the engine's buffers.
//!
//! An array is looked at in full when it is registered. At each step its header is read again (address,
//! shape, strides, flags, dtype) without NumPy calls and compared with what was seen; anything that
//! changed goes through the full gate again and either passes or is named. rust-numpy's borrow table is
//! not used: it costs a lock and a hash look-up per array and step, and its borrows do not keep Python
//! code in other threads away.

use std::sync::Arc;

use numpy::npyffi::flags::{NPY_ARRAY_ALIGNED, NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_WRITEABLE};
use numpy::{PyArray1, PyArrayDescr, PyArrayDescrMethods, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use roptim::checkpoint::Bytes;
use roptim::tensor::{Buffer, RawTensor, Strides};
use roptim::{Dtype, Error, ErrorKind};

use crate::errors::{raise, refuse};
use crate::overlap::interleave;

/// Whether a step writes to the array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// A parameter.
    Write,
    /// A gradient.
    Read,
}

impl Access {
    /// Whether an array with these flags may be accessed so.
    fn allows(self, flags: i32) -> bool {
        let needed = match self {
            Self::Write => NPY_ARRAY_ALIGNED | NPY_ARRAY_WRITEABLE,
            Self::Read => NPY_ARRAY_ALIGNED,
        };
        flags & needed == needed
    }
}

/// How messages speak of an array: where, and which.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    /// The call.
    pub(crate) place: &'a str,
    /// The array.
    pub(crate) label: &'a str,
}

/// An array as last seen.
#[derive(Debug)]
pub(crate) struct Seen {
    /// What the engine gets: of complex arrays their parts.
    pub(crate) raw: RawTensor,
    /// What the array stores.
    pub(crate) dtype: Dtype,
    shape: Vec<usize>,
    strides: Vec<isize>,
    /// Held, so that no other dtype takes its address.
    descr: Py<PyArrayDescr>,
}

struct Header {
    data: *mut u8,
    flags: i32,
    descr: *mut std::ffi::c_void,
}

fn header(array: &Bound<'_, PyUntypedArray>) -> Header {
    // SAFETY: the object is an ndarray, checked when the Bound was made, and alive.
    let fields = unsafe { &(*array.as_array_ptr()).fields };
    Header { data: fields.data.cast(), flags: fields.flags, descr: fields.descr.cast() }
}

/// Whether two elements of a strided array may be the same memory: false only where the axes, sorted by
/// stride, nest, or (for small arrays) where no offset repeats.
fn overlaps_itself(strides: &Strides, item: usize) -> bool {
    let mut axes: Vec<(usize, usize)> = strides
        .shape
        .iter()
        .zip(&strides.bytes)
        .filter(|(n, _)| **n > 1)
        .map(|(&n, &step)| (step.unsigned_abs(), n))
        .collect();
    axes.sort_unstable();
    let mut reach = item;
    let nested = axes.iter().all(|&(step, n)| {
        let fits = step >= reach;
        // All that the axes so far span together.
        reach += step * (n - 1);
        fits
    });
    if nested {
        return false;
    }
    let count: usize = axes.iter().map(|(_, n)| n).product();
    if axes.first().is_some_and(|(step, _)| *step < item) || count > 1 << 20 {
        return true;
    }
    let mut offsets = vec![0usize];
    for (step, n) in axes {
        offsets = offsets.iter().flat_map(|o| (0..n).map(move |i| o + i * step)).collect();
    }
    offsets.sort_unstable();
    offsets.windows(2).any(|w| w[1] - w[0] < item)
}

/// The engine's dtype of an array, if it has one and is in the machine's byte order. NumPy is not asked whether dtypes are
/// equivalent: it may run code for the answer, and tells of errors there beside the call.
fn engine_dtype(array: &Bound<'_, PyUntypedArray>) -> Option<Dtype> {
    /// NumPy's own dtypes have numbers below it.
    const USERS: i32 = 256;
    let descr = array.dtype();
    if descr.is_native_byteorder() == Some(false) {
        return None;
    }
    match (descr.kind(), descr.itemsize()) {
        (b'f', 4) if descr.num() < USERS => Some(Dtype::F32),
        (b'f', 8) if descr.num() < USERS => Some(Dtype::F64),
        (b'f', 2) if descr.num() < USERS => Some(Dtype::F16),
        (b'c', 8) if descr.num() < USERS => Some(Dtype::C64),
        (b'c', 16) if descr.num() < USERS => Some(Dtype::C128),
        // That of the ml_dtypes package.
        (b'V', 2) => {
            let name: String = descr.getattr("name").ok()?.extract().ok()?;
            (name == Dtype::BF16.name()).then_some(Dtype::BF16)
        }
        _ => None,
    }
}

/// Name of a dtype that the engine does not have in any byte order.
pub(crate) fn foreign_dtype(array: &Bound<'_, PyUntypedArray>) -> Option<String> {
    let name: String = array.dtype().getattr("name").ok()?.extract().ok()?;
    Dtype::ALL.iter().all(|d| d.name() != name).then_some(name)
}

/// The object as an ndarray: exactly `numpy.ndarray` or `numpy.memmap`; a NumPy scalar as a gradient of a
/// 0-d parameter; a view of what another library has in memory. Python code may run here.
pub(crate) fn as_array<'py>(
    object: &Bound<'py, PyAny>,
    access: Access,
    context: Context<'_>,
) -> PyResult<Bound<'py, PyUntypedArray>> {
    static MEMMAP: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    static GENERIC: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    static VIEW: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = object.py();
    if let Ok(array) = object.cast_exact::<PyUntypedArray>() {
        return Ok(array.clone());
    }
    if let Ok(array) = object.cast::<PyUntypedArray>()
        && object.get_type().is(MEMMAP.import(py, "numpy", "memmap")?)
    {
        return Ok(array.clone());
    }
    // The type itself is asked, not the object, which could answer with code of its own.
    let array = if access == Access::Read && object.get_type().is_subclass(GENERIC.import(py, "numpy", "generic")?)? {
        py.import("numpy")?.call_method1("asarray", (object,))?
    } else {
        let arguments = (object, context.place, context.label, access == Access::Write);
        VIEW.import(py, "roptim._foreign", "view")?.call1(arguments)?
    };
    array.cast_into().map_err(|e| PyTypeError::new_err(e.to_string()))
}

/// The full look at an array. Everything a step relies on is checked here.
pub(crate) fn look(array: &Bound<'_, PyUntypedArray>, access: Access, context: Context<'_>) -> PyResult<Seen> {
    let py = array.py();
    let head = header(array);
    let no = |kind, allowed: &str, got: String, remedy| {
        Err(refuse(py, kind, context.place, context.label, allowed, got, Some(remedy)))
    };
    let Some(dtype) = engine_dtype(array) else {
        let descr = array.dtype();
        if descr.is_native_byteorder() == Some(false) {
            let remedy = "convert it with .astype(a.dtype.newbyteorder(\"=\"))";
            return no(ErrorKind::Value, "in native byte order", format!("dtype {descr}"), remedy);
        }
        // Who has no bfloat16 keeps its bits as such numbers.
        let remedy = match descr.kind() {
            b'u' if descr.itemsize() == 2 => {
                "convert it with .astype(numpy.float32), or bits of bfloat16 with .view(ml_dtypes.bfloat16)"
            }
            _ => "convert it with .astype(numpy.float32)",
        };
        let allowed = "float32, float64, complex64, complex128, float16 or bfloat16";
        return no(ErrorKind::Type, allowed, descr.to_string(), remedy);
    };
    if head.flags & NPY_ARRAY_ALIGNED == 0 {
        return no(ErrorKind::Value, "aligned", "a misaligned array".into(), "copy it with .copy()");
    }
    if access == Access::Write && head.flags & NPY_ARRAY_WRITEABLE == 0 {
        return no(ErrorKind::Value, "writeable", "a read-only array".into(), "copy it with .copy()");
    }
    let shape = array.shape().to_vec();
    let strides = array.strides().to_vec();
    let in_order = head.flags & NPY_ARRAY_C_CONTIGUOUS != 0 || array.len() == 0;
    let layout = (!in_order).then(|| Strides { shape: shape.clone(), bytes: strides.clone() });
    if access == Access::Write && layout.as_ref().is_some_and(|s| overlaps_itself(s, dtype.size())) {
        let got = format!("strides {strides:?} that visit memory twice");
        return no(ErrorKind::Value, "without elements that share memory", got, "copy it with .copy()");
    }
    let part = dtype.part();
    let layout = layout.map(|mut layout| {
        if dtype.is_complex() {
            layout.shape.push(2);
            layout.bytes.push(part.size() as isize);
        }
        Arc::new(layout)
    });
    let raw = RawTensor { ptr: head.data, len: array.len() * dtype.parts(), dtype: part, strides: layout };
    Ok(Seen { raw, dtype, shape, strides, descr: array.dtype().unbind() })
}

impl Seen {
    /// Whether the array's header still says what was seen.
    #[inline]
    pub(crate) fn still_holds(&self, array: &Bound<'_, PyUntypedArray>, access: Access) -> bool {
        let head = header(array);
        let in_order = self.raw.strides.is_none();
        // An array without elements is in order, whatever its flags say.
        let is_laid_out = if in_order && self.raw.len > 0 {
            head.flags & NPY_ARRAY_C_CONTIGUOUS != 0
        } else {
            array.strides() == self.strides
        };
        head.data == self.raw.ptr
            && head.descr == self.descr.as_ptr().cast()
            && access.allows(head.flags)
            && is_laid_out
            && self.has_shape(array)
    }

    /// The address of a gradient that resembles this parameter: in C order, same dtype object, same shape. `None`
    /// where the full look is needed.
    #[inline]
    pub(crate) fn glance(&self, gradient: &Bound<'_, PyUntypedArray>, access: Access) -> Option<*mut u8> {
        let head = header(gradient);
        let in_order = head.flags & NPY_ARRAY_C_CONTIGUOUS != 0;
        (head.descr == self.descr.as_ptr().cast() && in_order && access.allows(head.flags) && self.has_shape(gradient))
            .then_some(head.data)
    }

    #[inline]
    fn has_shape(&self, array: &Bound<'_, PyUntypedArray>) -> bool {
        let shape = array.shape();
        // Shapes are short: a call to compare memory takes longer.
        shape.len() == self.shape.len() && shape.iter().zip(&self.shape).all(|(a, b)| a == b)
    }

    /// Extent of each axis.
    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape
    }
}

/// Whether two arrays share memory, exactly; taken as true where NumPy finds the question too hard. Its answer takes
/// long, so the grid is asked first.
pub(crate) fn share_memory(a: (&Bound<'_, PyAny>, &RawTensor), b: (&Bound<'_, PyAny>, &RawTensor)) -> bool {
    let exact = || a.0.py().import("numpy")?.call_method1("shares_memory", (a.0, b.0, 1_000_000))?.is_truthy();
    !interleave(a.1, b.1) && exact().unwrap_or(true)
}

/// Keeps a buffer alive under the arrays that show it.
#[pyclass(frozen, module = "roptim._roptim")]
struct BufferOwner {
    buffer: Arc<Buffer>,
}

/// An array that shows the engine's buffer without a copy.
pub(crate) fn view<'py>(
    py: Python<'py>,
    buffer: &Arc<Buffer>,
    shape: &[usize],
    dtype: Dtype,
) -> PyResult<Bound<'py, PyAny>> {
    fn of<'py, T: numpy::Element>(owner: Bound<'py, PyAny>, raw: &RawTensor) -> Bound<'py, PyArray1<T>> {
        // SAFETY: the buffer is allocated, aligned, initialized and never moves; the owner keeps it alive.
        unsafe {
            let flat = numpy::ndarray::ArrayView1::from_shape_ptr(raw.len, raw.ptr.cast::<T>().cast_const());
            PyArray1::borrow_from_array(&flat, owner)
        }
    }
    let raw = buffer.raw();
    let owner = Bound::new(py, BufferOwner { buffer: Arc::clone(buffer) })?.into_any();
    debug_assert!(owner.cast::<BufferOwner>().is_ok_and(|o| Arc::ptr_eq(&o.get().buffer, buffer)));
    let flat = match raw.dtype {
        Dtype::F64 => of::<f64>(owner, &raw).into_any(),
        _ => of::<f32>(owner, &raw).into_any(),
    };
    let flat = if dtype.is_complex() { flat.call_method1("view", (dtype.name(),))? } else { flat };
    flat.call_method1("reshape", (shape.to_vec(),))
}

/// A new array, not yet filled; bfloat16 needs the ml_dtypes package.
pub(crate) fn empty<'py>(py: Python<'py>, dtype: &str, shape: &[usize]) -> PyResult<Bound<'py, PyAny>> {
    let numpy = py.import("numpy")?;
    if dtype == Dtype::BF16.name() {
        // NumPy knows the name from then on.
        py.import("ml_dtypes")?;
    }
    numpy.call_method1("empty", (shape.to_vec(), dtype))
}

/// A new array with a copy of the bytes.
pub(crate) fn from_bytes<'py>(
    py: Python<'py>,
    dtype: &str,
    shape: &[usize],
    bytes: &[u8],
) -> PyResult<Bound<'py, PyAny>> {
    let array = empty(py, dtype, shape)?;
    let flat = array.call_method1("reshape", (-1,))?.call_method1("view", ("uint8",))?;
    if !bytes.is_empty() {
        let flat = flat.cast_into::<PyArray1<u8>>().map_err(|e| PyTypeError::new_err(e.to_string()))?;
        flat.try_readwrite()?.as_slice_mut()?.copy_from_slice(bytes);
    }
    Ok(array)
}

/// A new array of these bytes: one that owns a copy where they are few, else one over the very memory.
pub(crate) fn of_bytes<'py>(
    py: Python<'py>,
    dtype: &str,
    shape: &[usize],
    bytes: Vec<u8>,
) -> PyResult<Bound<'py, PyAny>> {
    const FEW: usize = 64 * 1024;
    /// More than any element needs.
    const ALIGNMENT: usize = 16;
    if bytes.len() < FEW || !bytes.as_ptr().addr().is_multiple_of(ALIGNMENT) {
        return from_bytes(py, dtype, shape, &bytes);
    }
    PyArray1::from_vec(py, bytes).call_method1("view", (dtype,))?.call_method1("reshape", (shape.to_vec(),))
}

/// The memory of an array in C order, lent for the time of a save.
struct Lent {
    /// Keeps the memory where it is: NumPy moves none that somebody else holds.
    _array: Py<PyArray1<u8>>,
    address: usize,
    len: usize,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the array has these bytes, initialized, for as long as it is held, which is as long as `self`; NumPy
        // moves no memory that somebody else holds, unless it is told to (`resize` with `refcheck=False`). Python code
        // in another thread may write to it meanwhile, as with any NumPy operation that runs without the interpreter
        // lock: the bytes read then are torn, and nothing is derived from them but bytes.
        unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(self.address), self.len) }
    }
}

/// What becomes of the memory of arrays that are to be saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taking {
    /// It is read where it is.
    Lent,
    /// It is copied, and may change.
    Copied,
}

/// The bytes of any array in C order.
pub(crate) fn bytes(array: &Bound<'_, PyAny>, taking: Taking) -> PyResult<Bytes> {
    let py = array.py();
    let flat = py.import("numpy")?.call_method1("ascontiguousarray", (array,))?.call_method1("reshape", (-1,))?;
    let flat = flat.call_method1("view", ("uint8",))?.cast_into::<PyArray1<u8>>();
    let flat = flat.map_err(|e| PyTypeError::new_err(e.to_string()))?;
    let readable = flat.try_readonly()?;
    let slice = readable.as_slice()?;
    if taking == Taking::Lent {
        let (address, len) = (slice.as_ptr().expose_provenance(), slice.len());
        return Ok(Bytes::lent(Arc::new(Lent { _array: flat.clone().unbind(), address, len })));
    }
    let mut copy = Vec::new();
    if copy.try_reserve_exact(slice.len()).is_err() {
        let sentence = format!("roptim: {} bytes for the copy of an array could not be allocated", slice.len());
        return Err(raise(py, &Error::plain(ErrorKind::OutOfMemory, sentence)));
    }
    copy.extend_from_slice(slice);
    Ok(copy.into())
}
