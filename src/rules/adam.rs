//! Adam, and AdamW as its preset with decoupled weight decay.
//!
//! Kingma, Ba: *Adam: a method for stochastic optimization*, ICLR 2015, Algorithm 1:
//!
//! ```text
//! mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ
//! vₜ = β₂·vₜ₋₁ + (1 − β₂)·gₜ²
//! θₜ = θₜ₋₁ − lr · m̂ₜ / (√v̂ₜ + ε),   m̂ₜ = mₜ/(1 − β₁ᵗ),   v̂ₜ = vₜ/(1 − β₂ᵗ)
//! ```
//!
//! | symbol | argument |
//! |---|---|
//! | β₁, β₂ | `betas` |
//! | ε | `eps` |
//! | m, v | state `exp_avg`, `exp_avg_sq` |
//! | max v | state `max_exp_avg_sq`, with `amsgrad` |
//!
//! `amsgrad` (Reddi, Kale, Kumar: *On the convergence of Adam and beyond*, ICLR 2018) uses the largest v
//! so far in place of v. Decoupled decay is Loshchilov, Hutter: *Decoupled weight decay regularization*,
//! ICLR 2019.
//!
//! Deviations: the bias corrections are folded into the step size and into √v, as torch does; with
//! amsgrad the maximum runs over v before its bias correction, torch's form, while the paper has none.

use super::common::{BETAS, DECOUPLED, MAXIMIZE, WEIGHT_DECAY, eps, lr, moments, switch};
use crate::hyper::Hypers;
use crate::real::Real;
use crate::rule::{
    Declaration, Kernel, KernelFacts, KernelVisitor, MAX_COEFFICIENTS, Moment, Rule, ScalarSlots, Slot, coefficients,
    one_minus_power,
};

/// The rule.
#[derive(Debug)]
pub struct Adam;

coefficients!(
    /// Scalars of one step.
    Scalars {
        /// 1 − β₁.
        one_minus_beta1,
        /// β₂.
        beta2,
        /// 1 − β₂.
        one_minus_beta2,
        /// √(1 − β₂ᵗ).
        sqrt_correction2,
        /// ε.
        eps,
        /// −lr/(1 − β₁ᵗ).
        neg_step_size,
    }
);

impl<F: Real> Scalars<F> {
    #[inline(always)]
    fn descend(&self, p: F, m: F, v: F) -> F {
        let denominator = v.sqrt() / self.sqrt_correction2 + self.eps;
        p + (self.neg_step_size * m) / denominator
    }
}

/// Without amsgrad.
#[derive(Debug)]
pub struct Plain;

impl Kernel for Plain {
    const ENTRY: &'static str = "adam";
    const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
    type C<F: Real> = Scalars<F>;
    type S<F: Real> = [F; 2];

    #[inline(always)]
    fn update<F: Real>(c: &Scalars<F>, p: F, g: F, [m, v]: &mut [F; 2]) -> F {
        moments(c.one_minus_beta1, c.beta2, c.one_minus_beta2, g, m, v);
        c.descend(p, *m, *v)
    }
}

/// With amsgrad.
#[derive(Debug)]
pub struct Amsgrad;

impl Kernel for Amsgrad {
    const ENTRY: &'static str = "adam_amsgrad";
    const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
    type C<F: Real> = Scalars<F>;
    type S<F: Real> = [F; 3];

    #[inline(always)]
    fn update<F: Real>(c: &Scalars<F>, p: F, g: F, [m, v, v_max]: &mut [F; 3]) -> F {
        moments(c.one_minus_beta1, c.beta2, c.one_minus_beta2, g, m, v);
        *v_max = v_max.max_nan(*v);
        c.descend(p, *m, *v_max)
    }
}

impl Rule for Adam {
    const DECLARATION: Declaration = Declaration {
        stem: "adam",
        hypers: &[
            lr(1e-3),
            BETAS,
            eps(1e-8),
            WEIGHT_DECAY,
            switch("amsgrad", "divide by the largest second moment so far"),
            MAXIMIZE,
            DECOUPLED,
        ],
        slots: &[
            Slot { name: "exp_avg", doc: "first moment m" },
            Slot { name: "exp_avg_sq", doc: "second moment v" },
            Slot { name: "max_exp_avg_sq", doc: "largest v so far, with amsgrad" },
        ],
        paper: "Kingma, Ba 2015, Adam: a method for stochastic optimization",
        ..Declaration::COMMON
    };

    fn coefficients(h: &Hypers, at: Moment, _: &mut ScalarSlots) -> [f64; MAX_COEFFICIENTS] {
        let [beta1, beta2] = h.pair("betas");
        Scalars {
            one_minus_beta1: 1.0 - beta1,
            beta2,
            one_minus_beta2: 1.0 - beta2,
            sqrt_correction2: libm::sqrt(one_minus_power(beta2, at.step)),
            eps: h.float("eps"),
            neg_step_size: -(h.float("lr") / one_minus_power(beta1, at.step)),
        }
        .into_row()
    }

    fn with_kernel<V: KernelVisitor>(h: &Hypers, visitor: V) -> V::Out {
        if h.flag("amsgrad") { visitor.visit::<Amsgrad>() } else { visitor.visit::<Plain>() }
    }

    fn each_kernel(visit: &mut dyn FnMut(KernelFacts)) {
        visit(KernelFacts::of::<Plain>());
        visit(KernelFacts::of::<Amsgrad>());
    }
}
