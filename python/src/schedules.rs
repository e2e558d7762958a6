//! Learning-rate transitions of the engine as functions.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use roptim::schedule::cosine::Cosine;
use roptim::schedule::plateau::{Memory, Mode, Plateau, ThresholdMode, reduced};
use roptim::schedule::step::Step;
use roptim::schedule::{At, Transition};

use crate::errors::OrRaise;

/// The next value of a decay every `size` epochs.
#[pyfunction]
pub(crate) fn step_next(py: Python<'_>, current: f64, epoch: i64, size: i64, gamma: f64) -> PyResult<f64> {
    // Neither the base nor the first transition is special to this family.
    let at = At { current, base: current, epoch, initial: false };
    Ok(Step::new(size, gamma).or_raise(py)?.next(at))
}

/// Its value at an epoch.
#[pyfunction]
pub(crate) fn step_closed(py: Python<'_>, base: f64, epoch: i64, size: i64, gamma: f64) -> PyResult<f64> {
    Ok(Step::new(size, gamma).or_raise(py)?.closed(base, epoch))
}

/// The next value of a cosine.
#[pyfunction]
pub(crate) fn cosine_next(current: f64, base: f64, epoch: i64, initial: bool, t_max: f64, eta_min: f64) -> f64 {
    Cosine { t_max, eta_min }.next(At { current, base, epoch, initial })
}

/// Its value at an epoch.
#[pyfunction]
pub(crate) fn cosine_closed(base: f64, epoch: i64, t_max: f64, eta_min: f64) -> f64 {
    Cosine { t_max, eta_min }.closed(base, epoch)
}

fn plateau(mode: &str, threshold_mode: &str, threshold: f64, patience: i64, cooldown: i64) -> PyResult<Plateau> {
    let mode = match mode {
        "min" => Mode::Min,
        "max" => Mode::Max,
        _ => return Err(PyValueError::new_err("mode")),
    };
    let threshold_mode = match threshold_mode {
        "rel" => ThresholdMode::Rel,
        "abs" => ThresholdMode::Abs,
        _ => return Err(PyValueError::new_err("threshold_mode")),
    };
    Ok(Plateau { mode, threshold_mode, threshold, patience, cooldown })
}

/// What a plateau remembers after a metric, `(best, bad epochs, cooldown left)`, and whether to reduce.
#[pyfunction]
pub(crate) fn plateau_observe(
    rule: (String, String, f64, i64, i64),
    memory: (f64, i64, i64),
    metric: f64,
) -> PyResult<((f64, i64, i64), bool)> {
    let rule = plateau(&rule.0, &rule.1, rule.2, rule.3, rule.4)?;
    let memory = Memory { best: memory.0, bad_epochs: memory.1, cooldown_left: memory.2 };
    let (next, reduce) = rule.observe(memory, metric);
    Ok(((next.best, next.bad_epochs, next.cooldown_left), reduce))
}

/// The reduced value of a plateau.
#[pyfunction]
pub(crate) fn plateau_reduced(current: f64, factor: f64, floor: f64, eps: f64) -> f64 {
    reduced(current, factor, floor, eps)
}
