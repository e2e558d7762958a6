//! Arrays on a device as Python sees them.

use std::sync::Arc;

use numpy::PyUntypedArrayMethods;
use pyo3::prelude::*;
use roptim::cpu::Threads;
use roptim::error::shape_text;
use roptim::gpu::{self, Array};
use roptim::{Dtype, ErrorKind, TensorMut, TensorRef};

use crate::arrays::{self, Access, Context, as_array, look};
use crate::errors::{OrRaise, guarded, refuse};

/// Bytes from which copies are worth several threads.
const COPY_IN_PARALLEL: usize = 1 << 20;

/// Numbers on a device, with a shape.
#[pyclass(frozen, subclass, weakref, module = "roptim._roptim")]
pub(crate) struct DeviceArray {
    array: Arc<Array>,
    shape: Vec<usize>,
    dtype: Dtype,
}

impl DeviceArray {
    /// As a gradient.
    pub(crate) fn as_gradient(&self) -> TensorRef<'static> {
        self.array.as_gradient()
    }

    /// Extent of each axis.
    pub(crate) fn extents(&self) -> &[usize] {
        &self.shape
    }

    /// What it stores.
    pub(crate) fn stores(&self) -> Dtype {
        self.dtype
    }

    fn refuse_other_form(&self, py: Python<'_>, place: &str, shape: &[usize], dtype: Dtype) -> PyResult<()> {
        if (shape, dtype) == (&self.shape[..], self.dtype) {
            return Ok(());
        }
        let allowed = format!("{} of shape {}", self.dtype, shape_text(&self.shape));
        let got = format!("{dtype} of shape {}", shape_text(shape));
        Err(refuse(py, ErrorKind::Value, place, "the new value", allowed, got, None))
    }

    /// Its values in a new NumPy array.
    pub(crate) fn home<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let place = "roptim.gpu.Array";
        let made = arrays::empty(py, self.dtype.name(), &self.shape)?;
        let array = as_array(&made, Access::Write, Context { place, label: "the new array" })?;
        let seen = look(&array, Access::Write, Context { place, label: "the new array" })?;
        // SAFETY: made just now, known to nobody else, held by `array`.
        let mut target = unsafe { TensorMut::from_raw(seen.raw) };
        let mut threads = Threads::new(None);
        let read = || {
            let pool = threads.pool(self.array.len() * self.array.dtype().size() >= COPY_IN_PARALLEL);
            guarded(place, || self.array.read(place, pool, &mut target))
        };
        py.detach(read).or_raise(py)?;
        Ok(made)
    }
}

#[pymethods]
impl DeviceArray {
    /// The values of `data` on the device that `selector` names.
    #[new]
    fn new(py: Python<'_>, data: &Bound<'_, PyAny>, selector: &str, allow_software: bool) -> PyResult<Self> {
        let place = "roptim.gpu.array";
        let context = Context { place, label: "data" };
        let array = as_array(data, Access::Read, context)?;
        let seen = look(&array, Access::Read, context)?;
        let request = crate::devices::request(selector, allow_software);
        let (dtype, len) = (seen.dtype, seen.raw.len);
        let made = py.detach(|| guarded(place, || Array::zeros(place, &request, dtype.part(), len))).or_raise(py)?;
        let new = Self { array: Arc::new(made), shape: array.shape().to_vec(), dtype };
        new.write(py, data)?;
        Ok(new)
    }

    /// Replaces the values by those of an array of the same shape and dtype, on the host or on this device.
    fn write(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let place = "roptim.gpu.Array";
        if let Ok(other) = data.cast::<Self>() {
            let other = other.get();
            self.refuse_other_form(py, place, &other.shape, other.dtype)?;
            return py.detach(|| guarded(place, || self.array.copy_from(place, &other.array))).or_raise(py);
        }
        let context = Context { place, label: "the new value" };
        let array = as_array(data, Access::Read, context)?;
        let seen = look(&array, Access::Read, context)?;
        self.refuse_other_form(py, place, array.shape(), seen.dtype)?;
        // SAFETY: looked at just now; `array` is held until the copy is over, and nothing is written.
        let source = unsafe { TensorRef::from_raw(seen.raw) };
        let mut threads = Threads::new(None);
        let write = || {
            let pool = threads.pool(source.len() * self.array.dtype().size() >= COPY_IN_PARALLEL);
            guarded(place, || self.array.write(place, pool, &source))
        };
        py.detach(write).or_raise(py)
    }

    /// The values in a new NumPy array.
    fn numpy<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.home(py)
    }

    /// Extent of each axis.
    #[getter]
    fn shape(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        Ok(pyo3::types::PyTuple::new(py, &self.shape)?.into_any().unbind())
    }

    /// Name of the dtype.
    #[getter]
    fn dtype_name(&self) -> &'static str {
        self.dtype.name()
    }

    /// Name of the device.
    #[getter]
    fn device(&self, py: Python<'_>) -> PyResult<String> {
        Ok(self.array.device("roptim.gpu.Array").or_raise(py)?.name.clone())
    }
}

/// Waits until a device has done all it was given.
#[pyfunction]
pub(crate) fn synchronize(py: Python<'_>, selector: &str, allow_software: bool) -> PyResult<()> {
    let (place, request) = ("roptim.gpu.synchronize", crate::devices::request(selector, allow_software));
    py.detach(|| guarded(place, || gpu::synchronize(place, &request))).or_raise(py)
}

/// A norm on a device.
#[pyclass(frozen, module = "roptim._roptim")]
pub(crate) struct DeviceNorm {
    norm: gpu::Norm,
}

#[pymethods]
impl DeviceNorm {
    /// Waits for it.
    fn value(&self, py: Python<'_>) -> PyResult<f64> {
        py.detach(|| guarded("clip_grad_norm_", || self.norm.value("clip_grad_norm_"))).or_raise(py)
    }
}

/// Scales arrays on one device so that their common 2-norm is at most `max_norm`, if there is one; the norm they had.
#[pyfunction]
pub(crate) fn clip_norm_on_device(
    py: Python<'_>,
    arrays: Vec<Bound<'_, DeviceArray>>,
    max_norm: Option<f64>,
    place: &str,
) -> PyResult<DeviceNorm> {
    let arrays: Vec<Arc<Array>> = arrays.iter().map(|array| Arc::clone(&array.get().array)).collect();
    for (i, array) in arrays.iter().enumerate() {
        if let Some(other) = arrays[..i].iter().position(|other| Arc::ptr_eq(other, array)) {
            let (label, got) = (format!("gradient {i}"), format!("gradient {other} again"));
            return Err(refuse(py, ErrorKind::Value, place, &label, "memory of its own", got, Some("give each once")));
        }
    }
    let norm = py.detach(|| guarded(place, || gpu::clip_norm(place, &arrays, max_norm))).or_raise(py)?;
    Ok(DeviceNorm { norm })
}
