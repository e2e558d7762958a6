//! RMSprop: steps scaled by a running root mean square of the gradients, optionally centered.
//!
//! Tieleman, Hinton: *Lecture 6.5: rmsprop*, Neural networks for machine learning, 2012; centered: Graves:
//! *Generating sequences with recurrent neural networks*, 2013, equations 38–41:
//!
//! ```text
//! vₜ = α·vₜ₋₁ + (1 − α)·gₜ²
//! ḡₜ = α·ḡₜ₋₁ + (1 − α)·gₜ                          centered
//! aₜ = √vₜ + ε,   centered: √(vₜ − ḡₜ²) + ε
//! bₜ = μ·bₜ₋₁ + gₜ/aₜ                               momentum
//! θₜ = θₜ₋₁ − lr·gₜ/aₜ,   momentum: θₜ₋₁ − lr·bₜ
//! ```
//!
//! | symbol | argument |
//! |---|---|
//! | α | `alpha` |
//! | μ | `momentum` |
//! | ε | `eps` |
//! | v, b, ḡ | state `square_avg`, `momentum_buffer`, `grad_avg` |
//!
//! Deviations: ε is added to the root, as torch does, where Graves has it inside; a difference vₜ − ḡₜ²
//! that rounding made negative counts as zero, where torch's root of it is not a number.

use super::common::{MAXIMIZE, WEIGHT_DECAY, eps, lr, switch};
use crate::hyper::{Hyper, Hypers, Range, Value};
use crate::real::Real;
use crate::rule::{
    Declaration, Kernel, KernelFacts, KernelVisitor, MAX_COEFFICIENTS, Moment, Rule, ScalarSlots, Slot, coefficients,
};

/// The rule.
#[derive(Debug)]
pub struct RmsProp;

coefficients!(
    /// Scalars of one step.
    Scalars {
        /// α.
        alpha,
        /// 1 − α.
        one_minus_alpha,
        /// ε.
        eps,
        /// μ.
        momentum,
        /// −lr.
        neg_lr,
    }
);

impl<F: Real> Scalars<F> {
    #[inline(always)]
    fn root(&self, g: F, v: &mut F) -> F {
        *v = *v * self.alpha + (self.one_minus_alpha * g) * g;
        v.sqrt() + self.eps
    }

    #[inline(always)]
    fn centered_root(&self, g: F, v: &mut F, mean: &mut F) -> F {
        *v = *v * self.alpha + (self.one_minus_alpha * g) * g;
        *mean = F::lerp(*mean, g, self.one_minus_alpha);
        let variance = *v - *mean * *mean;
        let variance = if variance < F::ZERO { F::ZERO } else { variance };
        variance.sqrt() + self.eps
    }

    #[inline(always)]
    fn descend(&self, p: F, g: F, a: F) -> F {
        p + (self.neg_lr * g) / a
    }

    #[inline(always)]
    fn descend_with_momentum(&self, p: F, g: F, a: F, b: &mut F) -> F {
        *b = *b * self.momentum + g / a;
        p + self.neg_lr * *b
    }
}

/// Neither momentum nor centered.
#[derive(Debug)]
pub struct Plain;

impl Kernel for Plain {
    const ENTRY: &'static str = "rmsprop";
    const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
    type C<F: Real> = Scalars<F>;
    type S<F: Real> = [F; 1];

    #[inline(always)]
    fn update<F: Real>(c: &Scalars<F>, p: F, g: F, [v]: &mut [F; 1]) -> F {
        let a = c.root(g, v);
        c.descend(p, g, a)
    }
}

/// With momentum.
#[derive(Debug)]
pub struct Momentum;

impl Kernel for Momentum {
    const ENTRY: &'static str = "rmsprop_momentum";
    const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
    type C<F: Real> = Scalars<F>;
    type S<F: Real> = [F; 2];

    #[inline(always)]
    fn update<F: Real>(c: &Scalars<F>, p: F, g: F, [v, b]: &mut [F; 2]) -> F {
        let a = c.root(g, v);
        c.descend_with_momentum(p, g, a, b)
    }
}

/// Centered.
#[derive(Debug)]
pub struct Centered;

impl Kernel for Centered {
    const ENTRY: &'static str = "rmsprop_centered";
    const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
    type C<F: Real> = Scalars<F>;
    type S<F: Real> = [F; 2];
    const SLOTS: &'static [usize] = &[0, 2];

    #[inline(always)]
    fn update<F: Real>(c: &Scalars<F>, p: F, g: F, [v, mean]: &mut [F; 2]) -> F {
        let a = c.centered_root(g, v, mean);
        c.descend(p, g, a)
    }
}

/// Centered, with momentum.
#[derive(Debug)]
pub struct CenteredMomentum;

impl Kernel for CenteredMomentum {
    const ENTRY: &'static str = "rmsprop_centered_momentum";
    const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
    type C<F: Real> = Scalars<F>;
    type S<F: Real> = [F; 3];

    #[inline(always)]
    fn update<F: Real>(c: &Scalars<F>, p: F, g: F, [v, b, mean]: &mut [F; 3]) -> F {
        let a = c.centered_root(g, v, mean);
        c.descend_with_momentum(p, g, a, b)
    }
}

impl Rule for RmsProp {
    const DECLARATION: Declaration = Declaration {
        stem: "rmsprop",
        hypers: &[
            lr(1e-2),
            Hyper { name: "momentum", default: Value::Float(0.0), range: Range::AtLeast(0.0), doc: "momentum μ" },
            Hyper {
                name: "alpha",
                default: Value::Float(0.99),
                range: Range::AtLeast(0.0),
                doc: "decay rate α of the running averages",
            },
            eps(1e-8),
            switch("centered", "divide by the standard deviation of the gradient"),
            WEIGHT_DECAY,
            MAXIMIZE,
        ],
        slots: &[
            Slot { name: "square_avg", doc: "running average v of squared gradients" },
            Slot { name: "momentum_buffer", doc: "running direction b, with momentum" },
            Slot { name: "grad_avg", doc: "running average ḡ of gradients, if centered" },
        ],
        paper: "Tieleman, Hinton 2012, Lecture 6.5: rmsprop",
        ..Declaration::COMMON
    };

    fn coefficients(h: &Hypers, _: Moment, _: &mut ScalarSlots) -> [f64; MAX_COEFFICIENTS] {
        let alpha = h.float("alpha");
        Scalars {
            alpha,
            one_minus_alpha: 1.0 - alpha,
            eps: h.float("eps"),
            momentum: h.float("momentum"),
            neg_lr: -h.float("lr"),
        }
        .into_row()
    }

    fn with_kernel<V: KernelVisitor>(h: &Hypers, visitor: V) -> V::Out {
        match (h.flag("centered"), h.float("momentum") != 0.0) {
            (false, false) => visitor.visit::<Plain>(),
            (false, true) => visitor.visit::<Momentum>(),
            (true, false) => visitor.visit::<Centered>(),
            (true, true) => visitor.visit::<CenteredMomentum>(),
        }
    }

    fn each_kernel(visit: &mut dyn FnMut(KernelFacts)) {
        visit(KernelFacts::of::<Plain>());
        visit(KernelFacts::of::<Momentum>());
        visit(KernelFacts::of::<Centered>());
        visit(KernelFacts::of::<CenteredMomentum>());
    }
}
