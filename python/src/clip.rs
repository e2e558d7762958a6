//! Global gradient norm.

use numpy::PyUntypedArray;
use pyo3::prelude::*;
use pyo3::types::PyList;
use roptim::TensorRef;
use roptim::cpu::{Threads, reduce};

use crate::arrays::{Access, Context, as_array, look};

/// The 2-norm of all arrays together, in float64, the same for any number of threads.
#[pyfunction]
pub(crate) fn norm(py: Python<'_>, arrays: &Bound<'_, PyList>) -> PyResult<f64> {
    let mut keep: Vec<Py<PyUntypedArray>> = Vec::with_capacity(arrays.len());
    let mut tensors = Vec::with_capacity(arrays.len());
    for (i, object) in arrays.iter().enumerate() {
        let label = format!("gradient {i}");
        let context = Context { place: "clip_grad_norm_", label: &label };
        let array = as_array(&object, Access::Read, context)?;
        let seen = look(&array, Access::Read, context)?;
        // SAFETY: looked at just now; `keep` holds the array; nothing is written.
        tensors.push(unsafe { TensorRef::from_raw(seen.raw) });
        keep.push(array.unbind());
    }
    Ok(py.detach(|| reduce::norm(&tensors, &mut Threads::new(None))))
}
