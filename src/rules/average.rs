//! Running averages of parameters, as a rule: the "parameter" is the average, the "gradient" what joins it.
//!
//! Equal weights: Izmailov, Podoprikhin, Garipov, Vetrov, Wilson: *Averaging weights leads to wider optima and better
//! generalization*, UAI 2018. Exponential weights: Polyak, Juditsky 1992; Tarvainen, Valpola 2017. At update n, from 1:
//!
//! ```text
//! a₁ = x₁
//! equal:        aₙ = aₙ₋₁ + (xₙ − aₙ₋₁)/n
//! exponential:  aₙ = β·aₙ₋₁ + (1 − β)·xₙ
//! ```
//!
//! | symbol | argument |
//! |---|---|
//! | β | `decay`; none for equal weights |
//!
//! With `lerp` both are `aₙ₋₁ + w·(xₙ − aₙ₋₁)` with the weight w = 1/n or 1 − β: the form of torch's averages of many
//! tensors at once, which rounds differently.
//!
//! No optimizer: it is in [`HELPERS`](super::HELPERS), beside the registry.

use crate::hyper::{Hyper, Hypers, Range, Value};
use crate::real::Real;
use crate::rule::{
    Declaration, Kernel, KernelFacts, KernelVisitor, MAX_COEFFICIENTS, Moment, Rule, ScalarSlots, coefficients,
};

use super::common::switch;

/// The rule.
#[derive(Debug)]
pub struct Average;

coefficients!(
    /// Scalars of one update.
    Scalars {
        /// 1 in the first update, else 0.
        first,
        /// n, β or w.
        a,
        /// 1 − β.
        b,
    }
);

macro_rules! kernel {
    ($(#[$meta:meta])* $name:ident, $entry:literal, |$c:ident, $p:ident, $x:ident| $average:expr) => {
        $(#[$meta])*
        #[derive(Debug)]
        pub struct $name;

        impl Kernel for $name {
            const ENTRY: &'static str = $entry;
            const COEFFICIENTS: &'static [&'static str] = Scalars::NAMES;
            type C<F: Real> = Scalars<F>;
            type S<F: Real> = [F; 0];

            #[inline(always)]
            fn update<F: Real>($c: &Scalars<F>, $p: F, $x: F, _: &mut [F; 0]) -> F {
                let average = $average;
                if $c.first == F::ONE { $x } else { average }
            }
        }
    };
}

kernel!(
    /// Equal weights.
    Equal, "average_equal", |c, p, x| p + (x - p) / c.a
);
kernel!(
    /// Exponential weights.
    Exponential, "average_exponential", |c, p, x| c.a * p + c.b * x
);
kernel!(
    /// Either, from the difference.
    Lerp, "average_lerp", |c, p, x| F::lerp(p, x, c.a)
);

fn decay(h: &Hypers) -> Option<f64> {
    match h.get("decay") {
        Some(Value::Float(decay)) => Some(decay),
        _ => None,
    }
}

impl Rule for Average {
    const DECLARATION: Declaration = Declaration {
        stem: "average",
        hypers: &[
            Hyper {
                name: "decay",
                default: Value::None,
                range: Range::OrNone(&Range::Within(0.0, 1.0)),
                doc: "decay β of exponential weights; None for equal ones",
            },
            switch("lerp", "add a part of the difference"),
        ],
        paper: "Izmailov, Podoprikhin, Garipov, Vetrov, Wilson 2018, Averaging weights leads to wider optima and better generalization",
        ..Declaration::COMMON
    };

    fn coefficients(h: &Hypers, at: Moment, _: &mut ScalarSlots) -> [f64; MAX_COEFFICIENTS] {
        let (n, decay) = (at.step as f64, decay(h));
        let a = match (h.flag("lerp"), decay) {
            (true, decay) => decay.map_or(1.0 / n, |decay| 1.0 - decay),
            (false, decay) => decay.unwrap_or(n),
        };
        let first = f64::from(u8::from(at.step == 1));
        Scalars { first, a, b: decay.map_or(0.0, |decay| 1.0 - decay) }.into_row()
    }

    fn with_kernel<V: KernelVisitor>(h: &Hypers, visitor: V) -> V::Out {
        match (h.flag("lerp"), decay(h)) {
            (true, _) => visitor.visit::<Lerp>(),
            (false, None) => visitor.visit::<Equal>(),
            (false, Some(_)) => visitor.visit::<Exponential>(),
        }
    }

    fn each_kernel(visit: &mut dyn FnMut(KernelFacts)) {
        visit(KernelFacts::of::<Equal>());
        visit(KernelFacts::of::<Exponential>());
        visit(KernelFacts::of::<Lerp>());
    }
}
