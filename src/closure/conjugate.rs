//! Nonlinear conjugate gradients, Polak–Ribière+.
//!
//! Polak, Ribière: *Note sur la convergence de méthodes de directions conjuguées*, RIRO 16, 1969, as in
//! Nocedal, Wright: *Numerical optimization*, 2nd ed., Algorithm 5.4 with equations (5.44) and (5.45):
//!
//! ```text
//! β = max(0, g·(g − g₋₁)/(g₋₁·g₋₁))
//! d = −g + β·d₋₁
//! ```
//!
//! It starts again from d = −g after `restart` iterations, where |g·g₋₁| ≥ 0.2·(g·g) (Powell: *Restart
//! procedures for the conjugate gradient method*, Mathematical Programming 12, 1977), and where d does not
//! go downhill. Steps satisfy the strong Wolfe conditions with c₂ = 0.1, the book's choice for this method.
//!
//! A search first tries t₋₁·(g₋₁·d₋₁)/(g·d), page 59 of the book, at most 10·t₋₁; where there is no such
//! positive number, min(1, 1/Σ|g|)·lr. So `lr` acts at the first iteration and after a search that found
//! nothing.

use super::descent::{Descent, Last, Method};
use super::parts::{Part, Parts};
use super::vector::{HostVector, Reduction, Vector};
use crate::error::Result;

/// Conjugate gradients over one flat vector on the CPU.
pub type ConjugateGradient<F> = Descent<HostVector<F>, Cycle>;
/// Settings of a step.
pub type Settings = super::descent::Settings<Options>;
/// What outlives a step.
pub type State<V> = super::descent::State<V, Cycle>;

/// Powell's measure of lost orthogonality.
const MAX_OVERLAP: f64 = 0.2;
/// How much longer than the last step the first trial may be.
const MAX_GROWTH: f64 = 10.0;

/// What a user chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Iterations from one start to the next; none for the number of elements.
    pub restart: Option<u64>,
}

/// How far the directions have come from −g.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cycle {
    /// Iterations since d = −g.
    pub since_restart: u64,
}

impl<V: Vector> Method<V> for Cycle {
    type Options = Options;
    const NAME: &'static str = "ConjugateGradient";
    const CURVATURE: f64 = 0.1;

    fn searches(_options: &Options) -> bool {
        true
    }

    fn direction(&mut self, options: &Options, last: &Last<V>, g: &V) -> V {
        let g_prev = &last.prev_flat_grad;
        let [gg, overlap, before] =
            V::reduce([Reduction::Dot(g, g), Reduction::Dot(g, g_prev), Reduction::Dot(g_prev, g_prev)]);
        let beta = (gg - overlap) / before;
        let cycle = options.restart.unwrap_or(g.len() as u64);
        let mut d = g.negative();
        self.since_restart += 1;
        if self.since_restart < cycle && beta > 0.0 && overlap.abs() < MAX_OVERLAP * gg {
            d.add_scaled(beta, &last.d);
            if g.dot(&d) < 0.0 {
                return d;
            }
            d = g.negative();
        }
        self.since_restart = 0;
        d
    }

    fn trial_step(_lr: f64, last: &Last<V>, slope: f64) -> Option<f64> {
        let growth = last.prev_flat_grad.dot(&last.d) / slope;
        let t = last.t * growth.min(MAX_GROWTH);
        (t > 0.0 && t.is_finite()).then_some(t)
    }

    fn parts(&self, _options: &Options) -> Vec<(&'static str, Part<V>)> {
        vec![("since_restart", Part::Count(self.since_restart))]
    }

    fn from_parts(parts: &mut Parts<V>) -> Result<Self> {
        Ok(Self { since_restart: parts.count("since_restart")? })
    }
}
