//! Rprop: steps whose size depends on the signs of the gradient alone.
//!
//! Riedmiller, Braun: *A direct adaptive method for faster backpropagation learning: the RPROP algorithm*,
//! ICNN 1993, in the variant without weight-backtracking of Igel, Hüsken 2000 (iRprop⁻):
//!
//! ```text
//! Δₜ = clamp(Δₜ₋₁·fₜ, Δmin, Δmax),   fₜ = η⁺, η⁻ or 1 where gₜ₋₁·gₜ > 0, < 0 or neither
//! gₜ ← 0 where gₜ₋₁·gₜ < 0
//! θₜ = θₜ₋₁ − sign(gₜ)·Δₜ
//! ```
//!
//! | symbol | argument |
//! |---|---|
//! | Δ₀ | `lr` |
//! | η⁻, η⁺ | `etas` |
//! | Δmin, Δmax | `step_sizes` |
//! | g, Δ | state `prev`, `step_size` |
//!
//! As in torch, `lr` is where Δ begins: changing it later changes the parameters that have no state yet.

use super::common::{MAXIMIZE, lr};
use crate::hyper::{Hyper, Hypers, Range, Value};
use crate::real::Real;
use crate::rule::{Declaration, Kernel, MAX_COEFFICIENTS, Moment, Rule, ScalarSlots, Slot, coefficients, only_kernel};

/// The rule.
#[derive(Debug)]
pub struct Rprop;

coefficients!(
    /// Scalars of one step.
    Scalars {
        /// 1 where the step sizes do not exist yet.
        first,
        /// Δ₀.
        start,
        /// η⁻.
        shrink,
        /// η⁺.
        grow,
        /// Δmin.
        smallest,
        /// Δmax.
        largest,
    }
);

/// The only variant.
#[derive(Debug)]
pub struct Plain;

impl Kernel for Plain {
    const ENTRY: &'static str = "rprop";
    const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
    type C<F: Real> = Scalars<F>;
    type S<F: Real> = [F; 2];

    #[inline(always)]
    fn update<F: Real>(c: &Scalars<F>, p: F, g: F, [previous, delta]: &mut [F; 2]) -> F {
        let agreement = g * *previous;
        let turned = agreement < F::ZERO;
        let factor = if turned { c.shrink } else { F::ONE };
        let factor = if agreement > F::ZERO { c.grow } else { factor };
        let size = factor * if c.first == F::ONE { c.start } else { *delta };
        let size = if size < c.smallest { c.smallest } else { size };
        *delta = if size > c.largest { c.largest } else { size };
        let g = if turned { F::ZERO } else { g };
        *previous = g;
        let down = if g > F::ZERO { *delta } else { F::ZERO };
        p - if g < F::ZERO { -*delta } else { down }
    }
}

impl Rule for Rprop {
    const DECLARATION: Declaration = Declaration {
        stem: "rprop",
        hypers: &[
            lr(1e-2),
            Hyper {
                name: "etas",
                default: Value::Pair([0.5, 1.2]),
                range: Range::PairAround(0.0, 1.0),
                doc: "factors η⁻, η⁺ on the step size",
            },
            Hyper {
                name: "step_sizes",
                default: Value::Pair([1e-6, 50.0]),
                range: Range::PairOrdered(0.0),
                doc: "smallest and largest step size",
            },
            MAXIMIZE,
        ],
        slots: &[
            Slot { name: "prev", doc: "last gradient, zero where its sign turned" },
            Slot { name: "step_size", doc: "step size Δ" },
        ],
        paper: "Riedmiller, Braun 1993, A direct adaptive method for faster backpropagation learning: the RPROP algorithm",
        ..Declaration::COMMON
    };

    fn coefficients(h: &Hypers, at: Moment, _: &mut ScalarSlots) -> [f64; MAX_COEFFICIENTS] {
        let ([shrink, grow], [smallest, largest]) = (h.pair("etas"), h.pair("step_sizes"));
        let first = f64::from(u8::from(at.fresh.has(1)));
        Scalars { first, start: h.float("lr"), shrink, grow, smallest, largest }.into_row()
    }

    only_kernel!(Plain);
}
