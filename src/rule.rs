//! What a rule is: the mathematics of one optimizer, on numbers.
//!
//! A [`Rule`] declares hyperparameters, slots and coefficients. Each of its variants (with and without
//! momentum, say) is a [`Kernel`]: one update of one element. A rule knows nothing of storage types,
//! threads, instruction sets, devices or Python. Weight decay, `maximize`, gradient scaling and the
//! flush of subnormal state are the executor's shared pre- and post-steps ([`Shared`]), not the rule's.
//!
//! A [`TensorRule`] is an optimizer whose update of one element depends on the others of its tensor. Methods that
//! evaluate the loss several times in a step are in [`crate::closure`].

use std::fmt::Debug;

use crate::error::Result;
use crate::hyper::{Hyper, Hypers, Value};
use crate::isa::Loops;
use crate::real::{Dtype, Real};

/// Most slots a rule may have.
pub const MAX_SLOTS: usize = 4;
/// Most scalar slots a rule may have.
pub const MAX_SCALARS: usize = 2;
/// Most coefficients a kernel may have.
pub const MAX_COEFFICIENTS: usize = 12;

/// One named state array of a parameter. It starts at zero; a rule that wants another start knows from
/// [`Moment::fresh`] when to put it there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// torch's state key.
    pub name: &'static str,
    /// One line for the documentation.
    pub doc: &'static str,
}

/// One named number of a parameter's state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scalar {
    /// torch's state key.
    pub name: &'static str,
    /// Its value before the first update.
    pub start: f64,
    /// One line for the documentation.
    pub doc: &'static str,
}

/// Values of a parameter's scalar slots; entries past the rule's own are zero.
pub type ScalarSlots = [f64; MAX_SCALARS];

/// Whether a rule takes gradients that touch some rows only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sparse {
    /// No.
    Refused,
    /// Yes, without weight decay; the rows it touches get the update that a dense gradient would give.
    Accepted,
    /// It takes no others.
    Required,
}

/// What a rule declares about itself.
#[derive(Debug)]
pub struct Declaration {
    /// The stem shared by rule, shader, reference and vectors.
    pub stem: &'static str,
    /// Hyperparameters in torch's order of `defaults`.
    pub hypers: &'static [Hyper],
    /// Every slot any variant may use.
    pub slots: &'static [Slot],
    /// Scalar slots.
    pub scalars: &'static [Scalar],
    /// State that is kept once for all parameters together and shown at the first one.
    pub joint: &'static [Slot],
    /// Whether it takes row-sparse gradients.
    pub sparse: Sparse,
    /// Whether torch makes the state in the constructor: state at step 0 is that of a parameter that was
    /// never updated.
    pub eager: bool,
    /// Whether the state shows a `step` key, as torch's does for this optimizer.
    pub shows_step: bool,
    /// Where the rule comes from.
    pub paper: &'static str,
}

impl Declaration {
    /// What most rules have in common: dense gradients, a step shown, no scalar slots.
    pub const COMMON: Self = Self {
        stem: "",
        hypers: &[],
        slots: &[],
        scalars: &[],
        joint: &[],
        sparse: Sparse::Refused,
        eager: false,
        shows_step: true,
        paper: "",
    };
}

/// Where a parameter is in its life, for the coefficients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Moment {
    /// Number of this update of this parameter, from 1.
    pub step: u64,
    /// Slots that were allocated for this update and are still zero.
    pub fresh: SlotSet,
}

/// A set of slots by position in the rule's declaration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SlotSet(u8);

impl SlotSet {
    /// No slot.
    pub const EMPTY: Self = Self(0);

    /// These slots.
    pub fn of(slots: &[usize]) -> Self {
        slots.iter().fold(Self::EMPTY, |set, &k| set.with(k))
    }

    /// With slot k.
    #[must_use]
    pub fn with(self, k: usize) -> Self {
        Self(self.0 | 1 << k)
    }

    /// Whether slot k is in it.
    pub fn has(self, k: usize) -> bool {
        self.0 & (1 << k) != 0
    }

    /// Whether no slot is in it.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The slots of either.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The slots of both.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The slots of this that are not in the other.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Its slots in order.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..MAX_SLOTS).filter(move |&k| self.has(k))
    }
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
    /// Elements of the gradient are brought into `[-bound, bound]` first; infinite leaves them untouched.
    pub gradient_bound: f64,
    /// Factor on the gradient (unscaling, norm clipping); 1 leaves it untouched.
    pub gradient_scale: f64,
    /// Whether the gradient's sign is turned first.
    pub maximize: bool,
    /// Weight decay.
    pub decay: Decay,
    /// Whether slots below the smallest normal number are stored as zero.
    pub flush_subnormals: bool,
    /// Whether the gradient's elements are set to zero after their use. On the CPU, of elementwise rules.
    pub clears_gradients: bool,
}

impl Shared {
    /// What changes nothing.
    pub const NEUTRAL: Self = Self {
        gradient_bound: f64::INFINITY,
        gradient_scale: 1.0,
        maximize: false,
        decay: Decay::None,
        flush_subnormals: false,
        clears_gradients: false,
    };
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
    /// Which of the declared slots they are; by default the first ones.
    const SLOTS: &'static [usize] = first_slots(<Self::S<f32> as SlotValues<f32>>::COUNT);
    /// Whether elements without a gradient may be left out: a zero gradient changes nothing, or the rule
    /// says that they rest.
    const RESTS: bool = false;

    /// The new parameter; slots are updated in place. `g` has passed the shared pre-steps, `p` has been
    /// decayed where the decay is decoupled.
    fn update<F: Real>(c: &Self::C<F>, p: F, g: F, slots: &mut Self::S<F>) -> F;
}

const fn first_slots(count: usize) -> &'static [usize] {
    const ALL: [usize; MAX_SLOTS] = [0, 1, 2, 3];
    ALL.split_at(count).0
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

    /// The kernel's coefficients of one update, and the scalar slots brought from before it to after it.
    fn coefficients(h: &Hypers, at: Moment, scalars: &mut ScalarSlots) -> [f64; MAX_COEFFICIENTS];

    /// Picks the variant that these hyperparameters ask for.
    fn with_kernel<V: KernelVisitor>(h: &Hypers, visitor: V) -> V::Out;

    /// Every variant, for tests and for the shader check.
    fn each_kernel(visit: &mut dyn FnMut(KernelFacts));
}

/// How weight decay enters: torch's L2, decoupled where that switch is on.
pub fn decay(h: &Hypers) -> Decay {
    let Some(Value::Float(weight_decay)) = h.get("weight_decay") else { return Decay::None };
    if weight_decay == 0.0 {
        Decay::None
    } else if h.flag("decoupled_weight_decay") {
        Decay::Decoupled(1.0 - h.float("lr") * weight_decay)
    } else {
        Decay::L2(weight_decay)
    }
}

/// What a tensor rule works on in one update: one parameter, in C order.
#[derive(Debug)]
pub struct Work<'a, F> {
    /// The parameter's shape.
    pub shape: &'a [usize],
    /// What the parameter's array stores.
    pub dtype: Dtype,
    /// The parameter.
    pub p: &'a mut [F],
    /// The gradient, its sign turned where the optimizer ascends.
    pub g: &'a [F],
    /// Its slots; empty where it has none.
    pub slots: [&'a mut [F]; MAX_SLOTS],
    /// How its loops run.
    pub loops: Loops,
    /// Working memory, as [`TensorRule::room`] asks for; what it holds nobody knows.
    pub elements: &'a mut [F],
    /// The same for sums.
    pub sums: &'a mut [f64],
}

/// Working memory of one update of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Room {
    /// Numbers of the compute type.
    pub elements: usize,
    /// Sums.
    pub sums: usize,
}

/// The mathematics of an optimizer that sees the whole tensor.
pub trait TensorRule: 'static {
    /// What it declares.
    const DECLARATION: Declaration;

    /// Whether a parameter may be given to it; refuses by name.
    fn accept(place: &str, label: &str, shape: &[usize], dtype: Dtype) -> Result<()>;

    /// Shape of slot k of a parameter; `None` where it has no such slot.
    fn slot_shape(k: usize, shape: &[usize]) -> Option<Vec<usize>>;

    /// The working memory that an update of a parameter of this shape takes. It is there before a step writes anything:
    /// an update allocates nothing, and so cannot fail for want of it.
    fn room(shape: &[usize]) -> Room;

    /// One update of one parameter that has elements. Weight decay is the rule's own.
    fn update<F: Real>(h: &Hypers, at: Moment, work: Work<'_, F>);

    /// The same on a GPU.
    const PROGRAM: Program;
}

/// Most units that the passes of a [`Program`] are cut into.
pub const MAX_UNITS: usize = 8;
/// Most areas of a [`Program`].
pub const MAX_AREAS: usize = 4;

/// How a tensor rule's passes see a tensor that has elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// Matrices of the last two axes; 0 where there are fewer axes.
    pub matrices: usize,
    /// Their rows; 0 without matrices.
    pub rows: usize,
    /// Their columns; 0 without matrices.
    pub columns: usize,
    /// Elements.
    pub len: usize,
    /// Elements of a chunk, but for the last one.
    pub chunk: usize,
}

impl Form {
    /// Of a tensor of this shape.
    pub fn new(shape: &[usize], chunk: usize) -> Self {
        let len = shape.iter().product();
        let [matrices, rows, columns] = match shape {
            [stack @ .., rows, columns] => [stack.iter().product(), *rows, *columns],
            _ => [0; 3],
        };
        Self { matrices, rows, columns, len, chunk }
    }

    /// How many chunks there are.
    pub fn chunks(&self) -> usize {
        self.len.div_ceil(self.chunk)
    }
}

/// What passes are cut into.
#[derive(Debug, Clone, Copy)]
pub struct Unit {
    /// How many a tensor has.
    pub count: fn(&Form) -> usize,
    /// Whether one lane works on one; else one workgroup.
    pub by_lane: bool,
}

/// Working memory that lasts for one step. What is in it before is not known.
#[derive(Debug, Clone, Copy)]
pub struct Area {
    /// Its name in WGSL, an array of `u32`.
    pub name: &'static str,
    /// Words that a tensor needs there.
    pub words: fn(&Form) -> usize,
}

/// One dispatch for all tensors.
#[derive(Debug, Clone, Copy)]
pub struct ProgramPass {
    /// Name of the WGSL entry point.
    pub entry: &'static str,
    /// What it is cut into, by position in [`Program::units`].
    pub unit: usize,
    /// Neighbours that repeat run in turns, as often as [`Program::turns`] says.
    pub repeats: bool,
}

/// The GPU's form of a tensor rule: passes over many tensors at once, in order.
///
/// Their text is the rule's file in `shaders/rules/`; `shaders/shared/tensor.wgsl` has what they find there.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// Names of the coefficients of a tensor, as the WGSL struct `Scalars` spells them.
    pub coefficients: &'static [&'static str],
    /// Constants of the text that the sizes here follow.
    pub constants: &'static [(&'static str, u32)],
    /// What passes are cut into. The first is chunks.
    pub units: &'static [Unit],
    /// Working memory.
    pub areas: &'static [Area],
    /// The passes.
    pub passes: &'static [ProgramPass],
    /// The coefficients of one update of a tensor of this shape and dtype, in f64.
    pub row: fn(&Hypers, Moment, &[usize], Dtype) -> [f64; MAX_COEFFICIENTS],
    /// How often the passes that repeat run.
    pub turns: fn(&Hypers) -> u32,
}

impl Program {
    /// Chunks, as every program's first unit has them.
    pub const CHUNKS: Unit = Unit { count: Form::chunks, by_lane: false };
    /// One for each tensor.
    pub const TENSORS: Unit = Unit { count: |_| 1, by_lane: false };
    /// The position of [`Program::CHUNKS`].
    pub const CHUNK_UNIT: usize = 0;
}

/// What a kernel declares, as data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelFacts {
    /// Name of the WGSL function.
    pub entry: &'static str,
    /// The slots it uses, by position in the rule's declaration.
    pub slots: &'static [usize],
    /// Its coefficients.
    pub coefficients: &'static [&'static str],
    /// Whether elements without a gradient may be left out.
    pub rests: bool,
}

impl KernelFacts {
    /// The facts of `K`.
    pub fn of<K: Kernel>() -> Self {
        Self { entry: K::ENTRY, slots: K::SLOTS, coefficients: K::COEFFICIENTS, rests: K::RESTS }
    }

    /// Those of a tensor rule, under its stem.
    pub fn of_tensors<R: TensorRule>() -> Self {
        Self {
            entry: R::DECLARATION.stem,
            slots: first_slots(R::DECLARATION.slots.len()),
            coefficients: R::PROGRAM.coefficients,
            rests: false,
        }
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

/// x as a sum of two f32, for what WGSL computes in double-floats; as large as keeps them finite.
pub(crate) fn halves(x: f64) -> [f64; 2] {
    let x = x.clamp(-1e37, 1e37);
    let hi = f64::from(x as f32);
    [hi, x - hi]
}

/// `1 − βᵗ` without cancellation, `−expm1(t·ln β)`, from the pure-Rust libm so that every platform has
/// the same bits.
pub(crate) fn one_minus_power(beta: f64, step: u64) -> f64 {
    -libm::expm1(step as f64 * libm::log(beta))
}

/// The variants of a rule that has one.
macro_rules! only_kernel {
    ($kernel:ty) => {
        fn with_kernel<V: $crate::rule::KernelVisitor>(_: &$crate::hyper::Hypers, visitor: V) -> V::Out {
            visitor.visit::<$kernel>()
        }

        fn each_kernel(visit: &mut dyn FnMut($crate::rule::KernelFacts)) {
            visit($crate::rule::KernelFacts::of::<$kernel>());
        }
    };
}
pub(crate) use only_kernel;

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
