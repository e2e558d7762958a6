//! The registry as data for Python: defaults, ranges, slots, papers.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use roptim::REGISTRY;
use roptim::rule::Sparse;

use crate::values;

/// Every optimizer: name, hyperparameters with defaults and ranges, slots, paper.
#[pyfunction]
pub(crate) fn registry(py: Python<'_>) -> PyResult<Bound<'_, PyList>> {
    let out = PyList::empty(py);
    for preset in REGISTRY {
        let entry = PyDict::new(py);
        entry.set_item("name", preset.name)?;
        entry.set_item("paper", preset.paper())?;
        entry.set_item("defaults", values::to_dict(py, preset.hypers().iter())?)?;
        entry.set_item("fixed", preset.fixed.to_vec())?;
        let ranges = PyDict::new(py);
        for hyper in preset.declaration().hypers {
            ranges.set_item(hyper.name, hyper.range.to_string())?;
        }
        entry.set_item("ranges", ranges)?;
        entry.set_item("slots", preset.declaration().slots.iter().map(|s| s.name).collect::<Vec<_>>())?;
        entry.set_item("scalars", preset.declaration().scalars.iter().map(|s| s.name).collect::<Vec<_>>())?;
        entry.set_item("joint", preset.declaration().joint.iter().map(|s| s.name).collect::<Vec<_>>())?;
        entry.set_item("needs_closure", preset.needs_closure())?;
        entry.set_item("takes_sparse", preset.declaration().sparse != Sparse::Refused)?;
        entry.set_item("needs_sparse", preset.declaration().sparse == Sparse::Required)?;
        entry.set_item("backends", if preset.has_shader() { vec!["cpu", "gpu"] } else { vec!["cpu"] })?;
        entry.set_item("shows_step", preset.declaration().shows_step)?;
        out.append(entry)?;
    }
    Ok(out)
}
