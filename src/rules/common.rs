//! What several rules share: hyperparameters of the same meaning, and Adam's moments.

use crate::hyper::{Hyper, Range, Value};
use crate::real::Real;
use crate::rule::Slot;

/// Learning rate.
pub(super) const fn lr(default: f64) -> Hyper {
    Hyper { name: "lr", default: Value::Float(default), range: Range::AtLeast(0.0), doc: "learning rate" }
}

/// Decay rates of two running averages.
pub(super) const BETAS: Hyper = Hyper {
    name: "betas",
    default: Value::Pair([0.9, 0.999]),
    range: Range::PairFrom(0.0, 1.0),
    doc: "decay rates β₁, β₂ of the two running averages",
};

/// The term that keeps a denominator from being zero.
pub(super) const fn eps(default: f64) -> Hyper {
    Hyper {
        name: "eps",
        default: Value::Float(default),
        range: Range::AtLeast(0.0),
        doc: "term ε that keeps the denominator from being zero",
    }
}

/// Weight decay.
pub(super) const WEIGHT_DECAY: Hyper =
    Hyper { name: "weight_decay", default: Value::Float(0.0), range: Range::AtLeast(0.0), doc: "weight decay λ" };

/// Ascent.
pub(super) const MAXIMIZE: Hyper = switch("maximize", "ascend instead of descend");

/// Decay of the parameter itself.
pub(super) const DECOUPLED: Hyper =
    switch("decoupled_weight_decay", "decay the parameter itself, not through the gradient");

/// A switch that is off by default.
pub(super) const fn switch(name: &'static str, doc: &'static str) -> Hyper {
    Hyper { name, default: Value::Bool(false), range: Range::Flag, doc }
}

/// `m ← β₁·m + (1 − β₁)·g`, `v ← β₂·v + (1 − β₂)·g²`.
#[inline(always)]
pub(super) fn moments<F: Real>(one_minus_beta1: F, beta2: F, one_minus_beta2: F, g: F, m: &mut F, v: &mut F) {
    *m = F::lerp(*m, g, one_minus_beta1);
    *v = *v * beta2 + (one_minus_beta2 * g) * g;
}

/// Iterations of a step with a closure.
pub(super) const MAX_ITER: Hyper = Hyper {
    name: "max_iter",
    default: Value::Int(20),
    range: Range::Whole(1, i64::MAX),
    doc: "iterations in one step",
};

/// Evaluations of a step with a closure.
pub(super) const MAX_EVAL: Hyper = Hyper {
    name: "max_eval",
    default: Value::None,
    range: Range::OrNone(&Range::Whole(1, i64::MAX)),
    doc: "evaluations after which no further iteration begins; None for max_iter·5/4",
};

/// What counts as a minimum.
pub(super) const TOLERANCE_GRAD: Hyper = Hyper {
    name: "tolerance_grad",
    default: Value::Float(1e-7),
    range: Range::AtLeast(0.0),
    doc: "largest element of the gradient that counts as a minimum",
};

/// What counts as progress.
pub(super) const TOLERANCE_CHANGE: Hyper = Hyper {
    name: "tolerance_change",
    default: Value::Float(1e-9),
    range: Range::AtLeast(0.0),
    doc: "smallest change of the loss or of an element that counts as progress",
};

/// What every closure method keeps.
pub(super) const JOINT: [Slot; 6] = [
    Slot { name: "func_evals", doc: "evaluations in all steps" },
    Slot { name: "n_iter", doc: "iterations in all steps" },
    Slot { name: "d", doc: "direction of the last iteration" },
    Slot { name: "t", doc: "step length along it" },
    Slot { name: "prev_flat_grad", doc: "gradient where the last iteration began" },
    Slot { name: "prev_loss", doc: "loss where the last iteration began" },
];
