//! Global gradient norms.

use numpy::PyUntypedArray;
use pyo3::prelude::*;
use pyo3::types::PyList;
use roptim::cpu::{Threads, reduce};
use roptim::{ErrorKind, TensorRef};

use crate::arrays::{Access, Context, as_array, look, share_memory};
use crate::errors::refuse;
use crate::overlap::{Interval, Map};

/// The 2-norm of all arrays together in float64, or their largest magnitude. The arrays are about to be
/// scaled in place: each must be writeable, and none may share memory with another.
#[pyfunction]
pub(crate) fn norm(py: Python<'_>, arrays: &Bound<'_, PyList>, largest: bool) -> PyResult<f64> {
    let place = "clip_grad_norm_";
    let mut keep: Vec<Bound<'_, PyUntypedArray>> = Vec::with_capacity(arrays.len());
    for (i, object) in arrays.iter().enumerate() {
        let label = format!("gradient {i}");
        keep.push(as_array(&object, Access::Write, Context { place, label: &label })?);
    }
    let mut map = Map::default();
    let mut tensors = Vec::with_capacity(keep.len());
    for (i, array) in keep.iter().enumerate() {
        let label = format!("gradient {i}");
        let seen = look(array, Access::Write, Context { place, label: &label })?;
        if let Some(other) = map.meeting(&seen.raw).find(|other| share_memory(array, &keep[other.index])) {
            let got = format!("memory of gradient {}", other.index);
            return Err(refuse(py, ErrorKind::Value, place, &label, "memory of its own", got, Some("give each once")));
        }
        map.insert(Interval::of(&seen.raw, i, false));
        // SAFETY: looked at just now; `keep` holds the array; nothing is written.
        tensors.push(unsafe { TensorRef::from_raw(seen.raw) });
    }
    let mut threads = Threads::new(None);
    Ok(py.detach(|| if largest { reduce::largest(&tensors) } else { reduce::norm(&tensors, &mut threads) }))
}
