//! Averaged stochastic gradient descent.
//!
//! Polyak, Juditsky: *Acceleration of stochastic approximation by averaging*, SIAM J. Control Optim. 30,
//! 1992, with the rate of Bottou: *Large-scale machine learning with stochastic gradient descent*, 2010:
//!
//! ```text
//! ηₜ = lr/(1 + λ·lr·(t − 1))^α,   μₜ = 1/max(1, t − 1 − t₀)
//! θₜ = (1 − λ·ηₜ)·θₜ₋₁ − ηₜ·gₜ
//! xₜ = xₜ₋₁ + μₜ·(θₜ − xₜ₋₁)
//! ```
//!
//! | symbol | argument |
//! |---|---|
//! | λ | `lambd` |
//! | α | `alpha` |
//! | t₀ | `t0` |
//! | x, ηₜ₊₁, μₜ₊₁ | state `ax`, `eta`, `mu` |
//!
//! Deviations: η and μ are float64 and follow from the current hyperparameters; torch keeps both in
//! float32 and computes them a step ahead, so that a changed learning rate counts one step late.

use super::common::{MAXIMIZE, WEIGHT_DECAY, lr};
use crate::hyper::{Hyper, Hypers, Range, Value};
use crate::real::Real;
use crate::rule::{
    Declaration, Kernel, MAX_COEFFICIENTS, Moment, Rule, Scalar, ScalarSlots, Slot, coefficients, only_kernel,
};

/// The rule.
#[derive(Debug)]
pub struct Asgd;

coefficients!(
    /// Scalars of one step.
    Scalars {
        /// 1 − λ·ηₜ.
        shrink,
        /// −ηₜ.
        neg_eta,
        /// μₜ.
        mu,
    }
);

/// The only variant.
#[derive(Debug)]
pub struct Plain;

impl Kernel for Plain {
    const ENTRY: &'static str = "asgd";
    const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
    type C<F: Real> = Scalars<F>;
    type S<F: Real> = [F; 1];

    #[inline(always)]
    fn update<F: Real>(c: &Scalars<F>, p: F, g: F, [x]: &mut [F; 1]) -> F {
        let theta = p * c.shrink + c.neg_eta * g;
        let nearer = *x + (theta - *x) * c.mu;
        *x = if c.mu == F::ONE { theta } else { nearer };
        theta
    }
}

impl Rule for Asgd {
    const DECLARATION: Declaration = Declaration {
        stem: "asgd",
        hypers: &[
            lr(1e-2),
            Hyper { name: "lambd", default: Value::Float(1e-4), range: Range::Finite, doc: "decay λ" },
            Hyper {
                name: "alpha",
                default: Value::Float(0.75),
                range: Range::Finite,
                doc: "power α of the decaying rate",
            },
            Hyper {
                name: "t0",
                default: Value::Float(1e6),
                range: Range::AtLeastOrInfinite(0.0),
                doc: "update t₀ after which the average begins",
            },
            WEIGHT_DECAY,
            MAXIMIZE,
        ],
        slots: &[Slot { name: "ax", doc: "averaged parameter x" }],
        scalars: &[
            Scalar { name: "eta", start: 0.0, doc: "the next update's rate η" },
            Scalar { name: "mu", start: 1.0, doc: "the next update's weight μ in the average" },
        ],
        paper: "Polyak, Juditsky 1992, Acceleration of stochastic approximation by averaging",
        ..Declaration::COMMON
    };

    fn coefficients(h: &Hypers, at: Moment, after: &mut ScalarSlots) -> [f64; MAX_COEFFICIENTS] {
        let (lr, lambd, alpha, t0) = (h.float("lr"), h.float("lambd"), h.float("alpha"), h.float("t0"));
        // Of the update after t.
        let rates = |t: u64| {
            let t = t as f64;
            [lr / libm::pow(1.0 + lambd * lr * t, alpha), 1.0 / (t - t0).max(1.0)]
        };
        let [eta, mu] = rates(at.step - 1);
        *after = rates(at.step);
        Scalars { shrink: 1.0 - lambd * eta, neg_eta: -eta, mu }.into_row()
    }

    only_kernel!(Plain);
}
