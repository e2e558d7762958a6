//! Stochastic gradient descent with momentum.
//!
//! Sutskever, Martens, Dahl, Hinton: *On the importance of initialization and momentum in deep
//! learning*, ICML 2013, in the form torch runs:
//!
//! ```text
//! b₁ = g₁                          the first buffer is the gradient itself
//! bₜ = μ·bₜ₋₁ + (1 − τ)·gₜ
//! uₜ = gₜ + μ·bₜ  (nesterov)  or  bₜ
//! θₜ = θₜ₋₁ − lr·uₜ
//! ```
//!
//! | symbol | argument |
//! |---|---|
//! | μ | `momentum` |
//! | τ | `dampening` |
//! | b | state `momentum_buffer` |
//!
//! Deviations from the paper, all torch's: the learning rate is not inside the buffer, and dampening
//! does not apply to the first gradient. Without momentum there is no state.

use super::common::{MAXIMIZE, WEIGHT_DECAY, lr, switch};
use crate::error::{Error, ErrorKind, Result};
use crate::hyper::{Hyper, Hypers, Range, Value};
use crate::real::Real;
use crate::rule::{
    Declaration, Kernel, KernelFacts, KernelVisitor, MAX_COEFFICIENTS, Moment, Rule, ScalarSlots, Slot, Sparse,
    coefficients,
};

/// The rule.
#[derive(Debug)]
pub struct Sgd;

coefficients!(
    /// Scalars of one step.
    Scalars {
        /// −lr.
        neg_lr,
        /// μ.
        momentum,
        /// 1 − τ.
        one_minus_dampening,
        /// 1 where the buffer does not exist yet.
        first,
        /// 1 with Nesterov momentum.
        nesterov,
    }
);

/// `θ − lr·g`.
#[derive(Debug)]
pub struct Plain;

impl Kernel for Plain {
    const ENTRY: &'static str = "sgd";
    const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
    type C<F: Real> = Scalars<F>;
    type S<F: Real> = [F; 0];
    const RESTS: bool = true;

    #[inline(always)]
    fn update<F: Real>(c: &Scalars<F>, p: F, g: F, _: &mut [F; 0]) -> F {
        p + c.neg_lr * g
    }
}

/// With a momentum buffer.
#[derive(Debug)]
pub struct Momentum;

impl Kernel for Momentum {
    const ENTRY: &'static str = "sgd_momentum";
    const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
    type C<F: Real> = Scalars<F>;
    type S<F: Real> = [F; 1];

    #[inline(always)]
    fn update<F: Real>(c: &Scalars<F>, p: F, g: F, [b]: &mut [F; 1]) -> F {
        let decayed = *b * c.momentum + c.one_minus_dampening * g;
        *b = if c.first == F::ONE { g } else { decayed };
        let ahead = g + c.momentum * *b;
        let u = if c.nesterov == F::ONE { ahead } else { *b };
        p + c.neg_lr * u
    }
}

impl Rule for Sgd {
    const DECLARATION: Declaration = Declaration {
        stem: "sgd",
        hypers: &[
            lr(1e-3),
            Hyper { name: "momentum", default: Value::Float(0.0), range: Range::AtLeast(0.0), doc: "momentum μ" },
            Hyper {
                name: "dampening",
                default: Value::Float(0.0),
                range: Range::Finite,
                doc: "dampening τ of the gradient in the buffer",
            },
            WEIGHT_DECAY,
            switch("nesterov", "Nesterov momentum"),
            MAXIMIZE,
        ],
        slots: &[Slot { name: "momentum_buffer", doc: "running direction b" }],
        sparse: Sparse::Accepted,
        shows_step: false,
        paper: "Sutskever, Martens, Dahl, Hinton 2013, On the importance of initialization and momentum in deep learning",
        ..Declaration::COMMON
    };

    fn validate(place: &str, h: &Hypers) -> Result<()> {
        if h.flag("nesterov") && (h.float("momentum") == 0.0 || h.float("dampening") != 0.0) {
            return Err(Error::refuse(
                ErrorKind::Value,
                place,
                "nesterov",
                "False unless momentum > 0 and dampening = 0",
                format!("True with momentum {:?} and dampening {:?}", h.float("momentum"), h.float("dampening")),
            ));
        }
        Ok(())
    }

    fn coefficients(h: &Hypers, at: Moment, _: &mut ScalarSlots) -> [f64; MAX_COEFFICIENTS] {
        Scalars {
            neg_lr: -h.float("lr"),
            momentum: h.float("momentum"),
            one_minus_dampening: 1.0 - h.float("dampening"),
            first: f64::from(u8::from(at.fresh.has(0))),
            nesterov: f64::from(u8::from(h.flag("nesterov"))),
        }
        .into_row()
    }

    fn with_kernel<V: KernelVisitor>(h: &Hypers, visitor: V) -> V::Out {
        if h.float("momentum") == 0.0 { visitor.visit::<Plain>() } else { visitor.visit::<Momentum>() }
    }

    fn each_kernel(visit: &mut dyn FnMut(KernelFacts)) {
        visit(KernelFacts::of::<Plain>());
        visit(KernelFacts::of::<Momentum>());
    }
}
