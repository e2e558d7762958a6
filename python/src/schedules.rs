//! Schedules of the engine: transitions as functions, values as objects.

use numpy::{IntoPyArray, PyArray1};
use pyo3::basic::CompareOp;
use pyo3::exceptions::{PyMemoryError, PyValueError};
use pyo3::prelude::*;
use roptim::schedule::chain::{At, Chain};
use roptim::schedule::cycle::{self, Anneal, Cycles};
use roptim::schedule::plateau::{Memory, Mode, Plateau, ThresholdMode, reduced};
use roptim::schedule::value;
use roptim::{Error, ErrorKind};

use crate::errors::{OrRaise, raise};

/// The next values of a chainable schedule: torch's class and its numbers, each group's current and base value, the
/// epoch that begins, whether at construction.
#[pyfunction]
pub(crate) fn chain_next(
    py: Python<'_>,
    class_name: &str,
    numbers: Vec<f64>,
    values: Vec<(f64, f64)>,
    epoch: f64,
    initial: bool,
) -> PyResult<Vec<f64>> {
    let chain = Chain::new(class_name, &numbers).or_raise(py)?;
    Ok(values.into_iter().map(|(current, base)| chain.next(At { current, base, epoch, initial })).collect())
}

/// Its values at an epoch, from the base values.
#[pyfunction]
pub(crate) fn chain_closed(
    py: Python<'_>,
    class_name: &str,
    numbers: Vec<f64>,
    bases: Vec<f64>,
    epoch: f64,
) -> PyResult<Vec<f64>> {
    let chain = Chain::new(class_name, &numbers).or_raise(py)?;
    Ok(bases.into_iter().map(|base| chain.closed(base, epoch)).collect())
}

/// From `high` at 0 to `low` at `whole`, along half a cosine.
#[pyfunction]
pub(crate) fn half_cosine(high: f64, low: f64, t: f64, whole: f64) -> f64 {
    cycle::half_cosine(high, low, t, whole)
}

/// Number of the cycle, from 1, and height between 0 and 1 of a triangle wave at step `t`.
#[pyfunction]
pub(crate) fn triangle(t: f64, up: f64, down: f64) -> (f64, f64) {
    cycle::triangle(t, up, down)
}

/// The factor of such a height at step `t` of a cycle.
#[pyfunction]
pub(crate) fn cycle_scale(mode: &str, t: f64, cycle: f64, gamma: f64) -> PyResult<f64> {
    let mode = match mode {
        "triangular" => Cycles::Triangular,
        "triangular2" => Cycles::Triangular2,
        "exp_range" => Cycles::ExpRange,
        _ => return Err(PyValueError::new_err("mode")),
    };
    Ok(mode.scale(t, cycle, gamma))
}

fn anneal(strategy: &str) -> PyResult<Anneal> {
    match strategy {
        "cos" => Ok(Anneal::Cos),
        "linear" => Ok(Anneal::Linear),
        _ => Err(PyValueError::new_err("anneal_strategy")),
    }
}

/// How much of an annealing is done at a part of its way.
#[pyfunction]
pub(crate) fn anneal_share(strategy: &str, part: f64) -> PyResult<f64> {
    Ok(anneal(strategy)?.share(part))
}

/// The value of a one-cycle schedule at step `t` between the values at its three or four knots.
#[pyfunction]
pub(crate) fn one_cycle(t: f64, total: f64, pct_start: f64, strategy: &str, knots: Vec<f64>) -> PyResult<f64> {
    if !matches!(knots.len(), 3 | 4) {
        return Err(PyValueError::new_err("knots"));
    }
    Ok(cycle::one_cycle(t, total, pct_start, anneal(strategy)?, &knots))
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

/// A schedule as a value.
#[pyclass(frozen, module = "roptim._roptim")]
pub(crate) struct Schedule {
    value: value::Schedule,
}

impl Schedule {
    fn checked(py: Python<'_>, value: value::Schedule) -> PyResult<Self> {
        value.check().or_raise(py)?;
        Ok(Self { value })
    }
}

#[pymethods]
impl Schedule {
    /// From the text of [`Schedule::json`].
    #[new]
    fn new(py: Python<'_>, json: &str) -> PyResult<Self> {
        let value = serde_json::from_str(json).map_err(|cause| {
            let sentence = format!("schedules.from_json: json must be the text of a schedule, got {cause}");
            raise(py, &Error::plain(ErrorKind::Value, sentence))
        })?;
        Self::checked(py, value)
    }

    /// As text.
    fn json(&self) -> PyResult<String> {
        serde_json::to_string(&self.value).map_err(|cause| PyValueError::new_err(cause.to_string()))
    }

    /// What it is.
    #[getter]
    fn name(&self) -> &'static str {
        self.value.name()
    }

    /// The update from which on the last value holds, or None.
    #[getter]
    fn length(&self) -> Option<u64> {
        self.value.length()
    }

    /// The value of update `t`.
    fn at(&self, t: u64) -> f64 {
        self.value.at(t)
    }

    /// The values of `n` updates from `start` on.
    fn values<'py>(&self, py: Python<'py>, start: u64, n: u64) -> PyResult<Bound<'py, PyArray1<f64>>> {
        let mut values = Vec::new();
        let room = usize::try_from(n).ok().filter(|&n| values.try_reserve_exact(n).is_ok());
        if room.is_none() {
            return Err(PyMemoryError::new_err(format!("schedule: {n} values could not be allocated")));
        }
        values.extend((0..n).map(|i| self.value.at(start.saturating_add(i))));
        Ok(values.into_pyarray(py))
    }

    /// This one and then another.
    fn then(&self, py: Python<'_>, next: &Self) -> PyResult<Self> {
        Ok(Self { value: self.value.clone().then(next.value.clone()).or_raise(py)? })
    }

    /// The product with another.
    fn times(&self, py: Python<'_>, other: &Self) -> PyResult<Self> {
        Ok(Self { value: self.value.clone().times(other.value.clone()).or_raise(py)? })
    }

    /// Kept within bounds.
    fn clip(&self, py: Python<'_>, low: Option<f64>, high: Option<f64>) -> PyResult<Self> {
        Self::checked(py, value::Schedule::Clip { of: self.value.clone().into(), low, high })
    }

    /// So many updates later.
    fn shift(&self, py: Python<'_>, by: i64) -> PyResult<Self> {
        Self::checked(py, value::Schedule::Shift { of: self.value.clone().into(), by })
    }

    fn __richcmp__(&self, other: &Self, op: CompareOp) -> Option<bool> {
        match op {
            CompareOp::Eq => Some(self.value == other.value),
            CompareOp::Ne => Some(self.value != other.value),
            _ => None,
        }
    }
}
