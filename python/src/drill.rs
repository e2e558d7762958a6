//! Panics on demand.

use pyo3::prelude::*;

/// For tests: the n-th part of work from now on panics, in whichever optimizer; none with 0. With `on_pool` only parts
/// that the engine's own threads do are counted. Returns how many were left of the drill before.
#[pyfunction]
pub(crate) fn _drill(n: usize, on_pool: bool) -> usize {
    roptim::drill::begin(n, on_pool)
}
