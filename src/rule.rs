//! What a rule is: the mathematics of one optimizer, on numbers.
//!
//! A [`Rule`] declares hyperparameters, slots and coefficients. Each of its variants (with and without
//! momentum, say) is a [`Kernel`]: one update of one element. A rule knows nothing of storage types,
//! threads, instruction sets, devices or Python. Weight decay, `maximize`, gradient scaling and the
//! flush of subnormal state are the executor's shared pre- and post-steps ([`Shared`]), not the rule's.

use std::fmt::Debug;

use crate::error::Result;
use crate::hyper::{Hyper, Hypers, Value};
use crate::real::Real;

/// Most slots a kernel may have.
pub const MAX_SLOTS: usize = 4;
/// Most coefficients a kernel may have.
pub const MAX_COEFFICIENTS: usize = 12;

/// One named state array of a parameter; it starts at zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// torch's state key.
    pub name: &'static str,
    /// One line for the documentation.
    pub doc: &'static str,
}

/// What a rule declares about itself.
#[derive(Debug)]
pub struct Declaration {
    /// The stem shared by rule, shader, reference and vectors.
    pub stem: &'static str,
    /// Hyperparameters in torch's order of `defaults`.
    pub hypers: &'static [Hyper],
    /// Every slot any variant may use. A variant uses the first few of them.
    pub slots: &'static [Slot],
    /// Whether the state shows a `step` key, as torch's does for this optimizer.
    pub shows_step: bool,
    /// Where the rule comes from.
    pub paper: &'static str,
}

/// Where a parameter is in its life, for the coefficients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Moment {
    /// Number of this update of this parameter, from 1.
    pub step: u64,
    /// Bit k: slot k was allocated for this update and is still zero.
    pub fresh: u8,
}

/// How weight decay enters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decay {
    /// Not at all.
    None,
    /// `g ← g + λ·θ`.
    L2(f64),
    /// `θ ← θ·(1 − lr·λ)`; the field is the factor.
    Decoupled(f64),
}

/// The executor's own scalars of one step: what happens to every element before and after the rule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shared {
    /// Factor on the gradient (unscaling, norm clipping); 1 leaves it untouched.
    pub gradient_scale: f64,
    /// Whether the gradient's sign is turned first.
    pub maximize: bool,
    /// Weight decay.
    pub decay: Decay,
    /// Whether slots below the smallest normal number are stored as zero.
    pub flush_subnormals: bool,
}

/// One step's coefficients of a kernel, in f64, in declaration order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Row {
    /// The executor's.
    pub shared: Shared,
    /// The kernel's; entries past the kernel's own are zero.
    pub coefficients: [f64; MAX_COEFFICIENTS],
}

/// Named coefficients of a kernel, over the compute type.
pub trait Coefficients<F: Real>: Copy + Send + Sync {
    /// One rounding of each coefficient.
    fn from_row(row: &[f64; MAX_COEFFICIENTS]) -> Self;
}

/// A fixed number of slot values of one element.
pub trait SlotValues<F: Real>: Copy + Debug {
    /// How many.
    const COUNT: usize;
    /// Reads slot k with `read(k)`.
    fn from_fn(read: impl FnMut(usize) -> F) -> Self;
    /// As a slice.
    fn as_slice(&self) -> &[F];
}

impl<F: Real, const N: usize> SlotValues<F> for [F; N] {
    const COUNT: usize = N;

    #[inline(always)]
    fn from_fn(read: impl FnMut(usize) -> F) -> Self {
        std::array::from_fn(read)
    }

    #[inline(always)]
    fn as_slice(&self) -> &[F] {
        self
    }
}

/// One variant of a rule: the update of one element.
pub trait Kernel: 'static {
    /// Name of the WGSL function of this variant.
    const ENTRY: &'static str;
    /// The coefficients' names in order, as the WGSL struct spells them.
    const COEFFICIENTS: &'static [&'static str];
    /// The coefficients.
    type C<F: Real>: Coefficients<F>;
    /// The slots.
    type S<F: Real>: SlotValues<F>;

    /// The new parameter; slots are updated in place. `g` has passed the shared pre-steps, `p` has been
    /// decayed where the decay is decoupled.
    fn update<F: Real>(c: &Self::C<F>, p: F, g: F, slots: &mut Self::S<F>) -> F;
}

/// Does something with a concrete kernel.
pub trait KernelVisitor {
    /// What it returns.
    type Out;
    /// Called with the kernel.
    fn visit<K: Kernel>(self) -> Self::Out;
}

/// The mathematics of one optimizer.
pub trait Rule: 'static {
    /// What it declares.
    const DECLARATION: Declaration;

    /// Conditions between hyperparameters; ranges have been checked.
    fn validate(_place: &str, _h: &Hypers) -> Result<()> {
        Ok(())
    }

    /// The kernel's coefficients of one update.
    fn coefficients(h: &Hypers, at: Moment) -> [f64; MAX_COEFFICIENTS];

    /// Picks the variant that these hyperparameters ask for.
    fn with_kernel<V: KernelVisitor>(h: &Hypers, visitor: V) -> V::Out;

    /// Every variant, for tests and for the shader check.
    fn each_kernel(visit: &mut dyn FnMut(KernelFacts));

    /// How weight decay enters; by default torch's L2, decoupled where that switch is on.
    fn decay(h: &Hypers) -> Decay {
        let Some(Value::Float(weight_decay)) = h.get("weight_decay") else { return Decay::None };
        if weight_decay == 0.0 {
            Decay::None
        } else if h.flag("decoupled_weight_decay") {
            Decay::Decoupled(1.0 - h.float("lr") * weight_decay)
        } else {
            Decay::L2(weight_decay)
        }
    }
}

/// What a kernel declares, as data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelFacts {
    /// Name of the WGSL function.
    pub entry: &'static str,
    /// How many slots it uses.
    pub slots: usize,
    /// Its coefficients.
    pub coefficients: &'static [&'static str],
}

impl KernelFacts {
    /// The facts of `K`.
    pub fn of<K: Kernel>() -> Self {
        Self { entry: K::ENTRY, slots: <K::S<f32> as SlotValues<f32>>::COUNT, coefficients: K::COEFFICIENTS }
    }
}

/// Returns a kernel's [`KernelFacts`].
#[derive(Debug, Clone, Copy)]
pub struct Facts;

impl KernelVisitor for Facts {
    type Out = KernelFacts;

    fn visit<K: Kernel>(self) -> KernelFacts {
        KernelFacts::of::<K>()
    }
}

/// `1 − βᵗ` without cancellation, `−expm1(t·ln β)`, from the pure-Rust libm so that every platform has
/// the same bits.
pub(crate) fn one_minus_power(beta: f64, step: u64) -> f64 {
    -libm::expm1(step as f64 * libm::log(beta))
}

/// Declares a coefficient struct over the compute type: fields in order, names as data, the f64 row and
/// its rounding.
macro_rules! coefficients {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $field:ident),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy)]
        pub struct $name<F> { $($(#[$doc])* pub $field: F),+ }

        impl $name<f64> {
            pub(crate) const NAMES: &'static [&'static str] = &[$(stringify!($field)),+];

            fn into_row(self) -> [f64; $crate::rule::MAX_COEFFICIENTS] {
                let mut row = [0.0; $crate::rule::MAX_COEFFICIENTS];
                let values = [$(self.$field),+];
                row[..values.len()].copy_from_slice(&values);
                row
            }
        }

        impl<F: $crate::real::Real> $crate::rule::Coefficients<F> for $name<F> {
            #[inline(always)]
            fn from_row(row: &[f64; $crate::rule::MAX_COEFFICIENTS]) -> Self {
                let mut values = row.iter().map(|&x| F::from_f64(x));
                Self { $($field: values.next().unwrap_or(F::ZERO)),+ }
            }
        }
    };
}
pub(crate) use coefficients;

#[cfg(test)]
mod tests {
    use super::one_minus_power;

    #[test]
    fn bias_correction_at_the_edges() {
        assert_eq!(one_minus_power(0.0, 1), 1.0);
        assert_eq!(one_minus_power(0.9, u64::MAX), 1.0);
        assert!((one_minus_power(0.999, 1) - 0.001).abs() < 1e-18);
    }
}
