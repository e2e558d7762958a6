//! Loading a saved state in two parts: every check, with a report of what would be done; then the doing.

use std::collections::BTreeMap;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use roptim::optimizer::matching::{LoadOptions, LoadReport, Members, matched};
use roptim::{StateDict, Value};

use crate::errors::OrRaise;
use crate::values;

/// A saved state that passed every check of one engine.
#[pyclass(frozen, module = "roptim._roptim")]
pub(crate) struct Loading {
    pub(crate) saved: StateDict,
    pub(crate) options: LoadOptions,
    pub(crate) report: LoadReport,
}

/// Index of a group, and dicts of one hyperparameter before and after.
type Changed<'py> = (usize, Bound<'py, PyDict>, Bound<'py, PyDict>);

#[pymethods]
impl Loading {
    /// Indices of the parameters that have the saved state, and of those that begin anew.
    #[getter]
    fn loaded(&self) -> (Vec<usize>, Vec<usize>) {
        (self.report.loaded.clone(), self.report.initialised.clone())
    }

    /// What is left out of the saved state.
    #[getter]
    fn dropped(&self) -> Vec<String> {
        self.report.dropped.clone()
    }

    /// For each group, the saved one it corresponds to.
    #[getter]
    fn groups(&self) -> Vec<Option<usize>> {
        self.report.groups.clone()
    }

    /// The class whose state is converted.
    #[getter]
    fn converted_from(&self) -> Option<String> {
        self.report.converted_from.clone()
    }

    /// Hyperparameters that stay as they are in a conversion.
    #[getter]
    fn kept(&self) -> Vec<&'static str> {
        self.report.kept.clone()
    }

    /// For each changed hyperparameter its group, and dicts of it before and after.
    fn changed<'py>(&self, py: Python<'py>) -> PyResult<Vec<Changed<'py>>> {
        let one = |name, value| values::to_dict(py, std::iter::once((name, value)));
        self.report.changed.iter().map(|c| Ok((c.group, one(c.name, c.old)?, one(c.name, c.new)?))).collect()
    }
}

/// What may differ: whether missing parameters are initialised, whether unexpected ones are dropped, new names by
/// saved ones, whether hyperparameters are kept.
pub(crate) type Rules = (bool, bool, BTreeMap<String, String>, bool);

/// The engine's options of such rules.
pub(crate) fn options(rules: Rules, hypers: Vec<(String, Value)>) -> LoadOptions {
    let (init_missing, drop_unexpected, rename, keep_hypers) = rules;
    LoadOptions { init_missing, drop_unexpected, rename, keep_hypers, hypers }
}

/// What a matching found: indices here and in the saved state, what begins anew, what is left out, groups.
type Found = (BTreeMap<usize, usize>, Vec<usize>, Vec<String>, Vec<Option<usize>>);

/// A group of parameters: indices, and names where there are some.
type Group = (Vec<usize>, Option<Vec<String>>);

fn members(groups: Vec<Group>) -> Vec<Members> {
    groups.into_iter().map(|(params, names)| Members { params, names }).collect()
}

/// Which parameter of a saved state goes to which here, by index; what begins anew; what is left out; and for
/// each group the saved one it corresponds to. The optimizers of the engine match by the same rules.
#[pyfunction]
pub(crate) fn match_parameters(
    py: Python<'_>,
    place: &str,
    ours: Vec<Group>,
    theirs: Vec<Group>,
    rules: Rules,
) -> PyResult<Found> {
    let matching = matched(place, &members(ours), &members(theirs), &options(rules, Vec::new())).or_raise(py)?;
    Ok((matching.sources, matching.initialised, matching.dropped, matching.groups))
}
