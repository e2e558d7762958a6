//! How many threads the engine may use.

use pyo3::prelude::*;

/// Bounds the threads of whatever the calling thread asks for from now on, None for no bound; returns the bound before.
#[pyfunction]
#[pyo3(signature = (limit))]
pub(crate) fn limit_threads(limit: Option<usize>) -> Option<usize> {
    const NONE: usize = usize::MAX;
    Some(roptim::cpu::pool::limit(limit.unwrap_or(NONE))).filter(|&before| before != NONE)
}
