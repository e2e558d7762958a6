//! Global gradient norms.

use numpy::PyUntypedArray;
use pyo3::prelude::*;
use pyo3::types::PyList;
use roptim::cpu::Threads;
use roptim::cpu::reduce::{self, Summand};
use roptim::{ErrorKind, TensorRef};

use crate::arrays::{Access, Context, Seen, as_array, look, share_memory};
use crate::errors::{OrRaise, guarded, refuse};
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
    let look = |(i, array)| look(array, access, Context { place, label: &format!("gradient {i}") });
    let seen = keep.iter().enumerate().map(look).collect::<PyResult<Vec<_>>>()?;
    let written = if written { &seen[..] } else { &[] };
    let map = Map::new(written.iter().enumerate().map(|(i, seen)| Interval::of(&seen.raw, i, false)).collect());
    for (i, here) in written.iter().enumerate() {
        let shares = |j: usize| share_memory((&keep[i], &here.raw), (&keep[j], &seen[j].raw));
        if let Some(other) = map.meeting(&here.raw).find(|other| other.index < i && shares(other.index)) {
            let (label, got) = (format!("gradient {i}"), format!("memory of gradient {}", other.index));
            return Err(refuse(py, ErrorKind::Value, place, &label, "memory of its own", got, Some("give each once")));
        }
    }
    let summand = |seen: Seen| {
        let is_complex = seen.dtype.is_complex();
        // SAFETY: looked at just now; `keep` holds the array; nothing is written.
        Summand { tensor: unsafe { TensorRef::from_raw(seen.raw) }, is_complex }
    };
    let summands: Vec<_> = seen.into_iter().map(summand).collect();
    let mut threads = Threads::new(None);
    py.detach(|| guarded(place, || reduce::p_norm(&summands, p, &mut threads))).or_raise(py)
}

/// What gradients of this norm are multiplied by so that it is at most `max_norm`.
#[pyfunction]
pub(crate) fn clip_factor(max_norm: f64, norm: f64) -> f64 {
    reduce::clip_factor(max_norm, norm)
}
