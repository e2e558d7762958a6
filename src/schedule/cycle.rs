//! Curves that several schedules share.

use std::f64::consts::PI;

/// How a value goes from one end to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Anneal {
    /// Along half a cosine.
    Cos,
    /// Along a line.
    Linear,
}

impl Anneal {
    /// The value between `start` (`part` 0) and `end` (`part` 1), in torch's order of operations.
    pub fn at(self, start: f64, end: f64, part: f64) -> f64 {
        match self {
            Self::Cos => end + (start - end) / 2.0 * (libm::cos(PI * part) + 1.0),
            Self::Linear => (end - start) * part + start,
        }
    }

    /// How much of the way is done at `part`.
    pub fn share(self, part: f64) -> f64 {
        match self {
            Self::Cos => (1.0 - libm::cos(PI * part)) / 2.0,
            Self::Linear => part,
        }
    }
}

/// `low + (high − low)·(1 + cos(π·t/whole))/2`: from `high` at 0 to `low` at `whole`.
pub fn half_cosine(high: f64, low: f64, t: f64, whole: f64) -> f64 {
    between(low, high, (1.0 + libm::cos(PI * t / whole)) / 2.0)
}

/// On the line from `a` to `b`, also where their difference is too large for a number.
pub(super) fn between(a: f64, b: f64, part: f64) -> f64 {
    let rise = b - a;
    if rise.is_finite() { a + rise * part } else { a * (1.0 - part) + b * part }
}

/// Where a triangle wave of `up` and `down` steps is at step `t`: the number of the cycle, from 1, and the height
/// between 0 and 1.
pub fn triangle(t: f64, up: f64, down: f64) -> (f64, f64) {
    let (total, ratio) = (up + down, up / (up + down));
    let cycle = libm::floor(1.0 + t / total);
    let x = 1.0 + t / total - cycle;
    (cycle, if x <= ratio { x / ratio } else { (x - 1.0) / (ratio - 1.0) })
}

/// How the height of a triangle wave changes with time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cycles {
    /// Not at all.
    Triangular,
    /// Half from cycle to cycle.
    Triangular2,
    /// By a factor from step to step.
    ExpRange,
}

impl Cycles {
    /// The height's factor at step `t` of cycle `cycle`.
    pub fn scale(self, t: f64, cycle: f64, gamma: f64) -> f64 {
        match self {
            Self::Triangular => 1.0,
            Self::Triangular2 => 1.0 / libm::pow(2.0, cycle - 1.0),
            Self::ExpRange => libm::pow(gamma, t),
        }
    }
}

/// The value of a one-cycle schedule at step `t`, between values at its knots: three of two phases, four of three.
///
/// Smith, Topin: *Super-convergence: very fast training of neural networks using large learning rates*, 2018, with
/// torch's ends of the phases: `pct_start·total − 1`, then `total − 1`; of three phases `2·pct_start·total − 2`
/// between them. Past the last end it goes on along the last phase's curve, as torch's does.
pub fn one_cycle(t: f64, total: f64, pct_start: f64, anneal: Anneal, knots: &[f64]) -> f64 {
    let ends: &[f64] = match knots.len() {
        4 => &[pct_start * total - 1.0, 2.0 * pct_start * total - 2.0, total - 1.0],
        _ => &[pct_start * total - 1.0, total - 1.0],
    };
    let phase = ends.iter().position(|&end| t <= end).unwrap_or(ends.len() - 1);
    let start = if phase == 0 { 0.0 } else { ends[phase - 1] };
    anneal.at(knots[phase], knots[phase + 1], (t - start) / (ends[phase] - start))
}
