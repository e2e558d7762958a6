//! Global gradient norms.

use numpy::PyUntypedArray;
use pyo3::prelude::*;
use pyo3::types::PyList;
use roptim::cpu::Threads;
use roptim::cpu::reduce::{self, Summand};
use roptim::{ErrorKind, TensorRef};

use crate::arrays::{Access, Context, as_array, look, share_memory};
use crate::errors::{OrRaise, refuse};
use crate::overlap::{Interval, Map};

/// The p-norm of all arrays together, in float64. Where they are about to be `written` each must be writeable, and
/// none may share memory with another. `place` starts messages.
#[pyfunction]
pub(crate) fn norm(py: Python<'_>, arrays: &Bound<'_, PyList>, p: f64, written: bool, place: &str) -> PyResult<f64> {
    let access = if written { Access::Write } else { Access::Read };
    let mut keep: Vec<Bound<'_, PyUntypedArray>> = Vec::with_capacity(arrays.len());
    for (i, object) in arrays.iter().enumerate() {
        let label = format!("gradient {i}");
        keep.push(as_array(&object, access, Context { place, label: &label })?);
    }
    let mut map = Map::default();
    let mut summands = Vec::with_capacity(keep.len());
    for (i, array) in keep.iter().enumerate() {
        let label = format!("gradient {i}");
        let seen = look(array, access, Context { place, label: &label })?;
        let met = map.meeting(&seen.raw).find(|other| written && share_memory(array, &keep[other.index]));
        if let Some(other) = met {
            let got = format!("memory of gradient {}", other.index);
            return Err(refuse(py, ErrorKind::Value, place, &label, "memory of its own", got, Some("give each once")));
        }
        map.insert(Interval::of(&seen.raw, i, false));
        let is_complex = seen.dtype.is_complex();
        // SAFETY: looked at just now; `keep` holds the array; nothing is written.
        summands.push(Summand { tensor: unsafe { TensorRef::from_raw(seen.raw) }, is_complex });
    }
    let mut threads = Threads::new(None);
    py.detach(|| reduce::p_norm(&summands, p, &mut threads)).or_raise(py)
}

/// What gradients of this norm are multiplied by so that it is at most `max_norm`.
#[pyfunction]
pub(crate) fn clip_factor(max_norm: f64, norm: f64) -> f64 {
    reduce::clip_factor(max_norm, norm)
}
