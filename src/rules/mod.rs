//! The registry: the one list of rules and presets.
//!
//! Whatever needs "all optimizers" iterates [`REGISTRY`].

pub mod adadelta;
pub mod adafactor;
pub mod adagrad;
pub mod adam;
pub mod adamax;
pub mod asgd;
pub mod average;
mod common;
pub mod conjugate_gradient;
pub mod lbfgs;
pub mod muon;
pub mod nadam;
pub mod radam;
pub mod rmsprop;
pub mod rprop;
pub mod sgd;
pub mod sparse_adam;

use crate::closure::{ClosureRule, descent};
use crate::error::{Error, ErrorKind, Result};
use crate::hyper::{Hypers, Value};
use crate::real::{Dtype, Real};
use crate::rule::{
    Declaration, Facts, KernelFacts, KernelVisitor, MAX_COEFFICIENTS, Moment, Program, Room, Rule, ScalarSlots,
    SlotSet, TensorRule, Work,
};

/// The three kinds of rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// An update of each element by itself.
    Elementwise(RuleId),
    /// An update that sees the whole tensor.
    Tensor(TensorRuleId),
    /// Steps that evaluate the loss several times and see all parameters as one vector.
    Closure(ClosureRuleId),
}

/// A named optimizer: a rule with its own defaults and fixed choices.
#[derive(Debug)]
pub struct Preset {
    /// torch's class name.
    pub name: &'static str,
    /// The rule.
    pub method: Method,
    /// Defaults that differ from the rule's.
    pub defaults: &'static [(&'static str, Value)],
    /// Hyperparameters that this preset fixes: users cannot set them.
    pub fixed: &'static [&'static str],
    /// Where it comes from; the rule's paper where it has none of its own.
    pub paper: Option<&'static str>,
    /// Other optimizers whose state it takes.
    pub takes: &'static [Conversion],
}

/// A class whose state means the same in another one.
#[derive(Debug, PartialEq, Eq)]
pub struct Conversion {
    /// The class that the state is of.
    pub from: &'static str,
    /// Hyperparameters that mean something else there, and stay as they are here.
    pub keeps: &'static [&'static str],
}

/// The moments of Adam and AdamW are the same, their weight decay is not.
const DECAY_MODE: &[&str] = &["weight_decay", "decoupled_weight_decay"];

/// Every optimizer, in the order of the documentation.
pub static REGISTRY: &[Preset] = &[
    Preset::of("SGD", Method::Elementwise(RuleId::Sgd)),
    Preset {
        takes: &[Conversion { from: "AdamW", keeps: DECAY_MODE }],
        ..Preset::of("Adam", Method::Elementwise(RuleId::Adam))
    },
    Preset {
        defaults: &[("weight_decay", Value::Float(1e-2)), ("decoupled_weight_decay", Value::Bool(true))],
        fixed: &["decoupled_weight_decay"],
        paper: Some("Loshchilov, Hutter 2019, Decoupled weight decay regularization"),
        takes: &[Conversion { from: "Adam", keeps: DECAY_MODE }],
        ..Preset::of("AdamW", Method::Elementwise(RuleId::Adam))
    },
    Preset::of("Adadelta", Method::Elementwise(RuleId::Adadelta)),
    Preset::of("Adagrad", Method::Elementwise(RuleId::Adagrad)),
    Preset::of("Adamax", Method::Elementwise(RuleId::Adamax)),
    Preset::of("ASGD", Method::Elementwise(RuleId::Asgd)),
    Preset::of("NAdam", Method::Elementwise(RuleId::NAdam)),
    Preset::of("RAdam", Method::Elementwise(RuleId::RAdam)),
    Preset::of("RMSprop", Method::Elementwise(RuleId::RmsProp)),
    Preset::of("Rprop", Method::Elementwise(RuleId::Rprop)),
    Preset::of("SparseAdam", Method::Elementwise(RuleId::SparseAdam)),
    Preset::of("Adafactor", Method::Tensor(TensorRuleId::Adafactor)),
    Preset::of("Muon", Method::Tensor(TensorRuleId::Muon)),
    Preset::of("LBFGS", Method::Closure(ClosureRuleId::Lbfgs)),
    Preset::of("ConjugateGradient", Method::Closure(ClosureRuleId::ConjugateGradient)),
];

/// What uses the same executors and is no optimizer.
pub static HELPERS: &[Preset] = &[Preset::of("AveragedModel", Method::Elementwise(RuleId::Average))];

macro_rules! rules {
    ($($id:ident => $rule:ty $(, $shader:literal)?;)+) => {
        /// Names a rule.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(missing_docs, reason = "the variants are the rules' own names")]
        pub enum RuleId { $($id),+ }

        impl RuleId {
            /// Every rule.
            pub const ALL: &'static [Self] = &[$(Self::$id),+];

            /// What the rule declares.
            pub fn declaration(self) -> &'static Declaration {
                match self { $(Self::$id => const { &<$rule>::DECLARATION }),+ }
            }

            /// The rule's text for the GPU, if it has one.
            pub fn shader(self) -> Option<&'static str> {
                match self { $(Self::$id => [$(include_str!(concat!("../../shaders/rules/", $shader)))?].first().copied()),+ }
            }

            /// Conditions between hyperparameters.
            pub fn validate(self, place: &str, h: &Hypers) -> Result<()> {
                match self { $(Self::$id => <$rule>::validate(place, h)),+ }
            }

            /// The coefficients of one update, and the scalar slots after it.
            pub fn coefficients(
                self, h: &Hypers, at: Moment, scalars: &mut ScalarSlots,
            ) -> [f64; MAX_COEFFICIENTS] {
                match self { $(Self::$id => <$rule>::coefficients(h, at, scalars)),+ }
            }

            /// Hands the variant's kernel to the visitor.
            pub fn with_kernel<V: KernelVisitor>(self, h: &Hypers, visitor: V) -> V::Out {
                match self { $(Self::$id => <$rule>::with_kernel(h, visitor)),+ }
            }

            /// Every variant's facts.
            pub fn kernels(self) -> Vec<KernelFacts> {
                let mut all = Vec::new();
                match self { $(Self::$id => <$rule>::each_kernel(&mut |facts| all.push(facts))),+ }
                all
            }
        }
    };
}

rules! {
    Sgd => sgd::Sgd, "sgd.wgsl";
    Adam => adam::Adam, "adam.wgsl";
    Adadelta => adadelta::Adadelta, "adadelta.wgsl";
    Adagrad => adagrad::Adagrad, "adagrad.wgsl";
    Adamax => adamax::Adamax, "adamax.wgsl";
    Asgd => asgd::Asgd, "asgd.wgsl";
    NAdam => nadam::NAdam, "nadam.wgsl";
    RAdam => radam::RAdam, "radam.wgsl";
    RmsProp => rmsprop::RmsProp, "rmsprop.wgsl";
    Rprop => rprop::Rprop, "rprop.wgsl";
    SparseAdam => sparse_adam::SparseAdam;
    Average => average::Average, "average.wgsl";
}

macro_rules! tensor_rules {
    ($($id:ident => $rule:ty, $shader:literal;)+) => {
        /// Names a tensor rule.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(missing_docs, reason = "the variants are the rules' own names")]
        pub enum TensorRuleId { $($id),+ }

        impl TensorRuleId {
            /// Every tensor rule.
            pub const ALL: &'static [Self] = &[$(Self::$id),+];

            /// What the rule declares.
            pub fn declaration(self) -> &'static Declaration {
                match self { $(Self::$id => const { &<$rule>::DECLARATION }),+ }
            }

            /// The rule's text for the GPU.
            pub fn shader(self) -> &'static str {
                match self { $(Self::$id => include_str!(concat!("../../shaders/rules/", $shader))),+ }
            }

            /// The rule's passes on the GPU.
            pub fn program(self) -> &'static Program {
                match self { $(Self::$id => const { &<$rule>::PROGRAM }),+ }
            }

            /// The rule's facts.
            pub fn facts(self) -> KernelFacts {
                match self { $(Self::$id => KernelFacts::of_tensors::<$rule>()),+ }
            }

            /// Whether a parameter may be given to it.
            pub fn accept(self, place: &str, label: &str, shape: &[usize], dtype: Dtype) -> Result<()> {
                match self { $(Self::$id => <$rule>::accept(place, label, shape, dtype)),+ }
            }

            /// Shape of slot k of a parameter; `None` where it has no such slot.
            pub fn slot_shape(self, k: usize, shape: &[usize]) -> Option<Vec<usize>> {
                match self { $(Self::$id => <$rule>::slot_shape(k, shape)),+ }
            }

            /// The working memory of an update.
            pub fn room(self, shape: &[usize]) -> Room {
                match self { $(Self::$id => <$rule>::room(shape)),+ }
            }

            /// One update of one tensor.
            pub fn update<F: Real>(self, h: &Hypers, at: Moment, work: Work<'_, F>) {
                match self { $(Self::$id => <$rule>::update(h, at, work)),+ }
            }
        }
    };
}

tensor_rules! {
    Adafactor => adafactor::Adafactor, "adafactor.wgsl";
    Muon => muon::Muon, "muon.wgsl";
}

/// Does something with a concrete closure method.
pub trait ClosureVisitor {
    /// What it returns.
    type Out;
    /// Called with the method.
    fn visit<R: ClosureRule>(self) -> Self::Out;
}

macro_rules! closure_rules {
    ($($id:ident => $rule:ty;)+) => {
        /// Names a closure method.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(missing_docs, reason = "the variants are the rules' own names")]
        pub enum ClosureRuleId { $($id),+ }

        impl ClosureRuleId {
            /// Every closure method.
            pub const ALL: &'static [Self] = &[$(Self::$id),+];

            /// What the method declares.
            pub fn declaration(self) -> &'static Declaration {
                match self { $(Self::$id => const { &<$rule>::DECLARATION }),+ }
            }

            /// Hands the method to the visitor.
            pub fn with_rule<V: ClosureVisitor>(self, visitor: V) -> V::Out {
                match self { $(Self::$id => visitor.visit::<$rule>()),+ }
            }
        }
    };
}

closure_rules! {
    Lbfgs => lbfgs::Lbfgs;
    ConjugateGradient => conjugate_gradient::ConjugateGradient;
}

impl Preset {
    const fn of(name: &'static str, method: Method) -> Self {
        Self { name, method, defaults: &[], fixed: &[], paper: None, takes: &[] }
    }

    /// Looks an optimizer up by its class name.
    pub fn find(name: &str) -> Result<&'static Self> {
        REGISTRY.iter().chain(HELPERS).find(|p| p.name == name).ok_or_else(|| {
            let names: Vec<_> = REGISTRY.iter().map(|p| p.name).collect();
            Error::refuse(ErrorKind::Name, "roptim", "optimizer", format!("one of {}", names.join(", ")), name)
        })
    }

    /// The rule's declaration.
    pub fn declaration(&self) -> &'static Declaration {
        match self.method {
            Method::Elementwise(rule) => rule.declaration(),
            Method::Tensor(rule) => rule.declaration(),
            Method::Closure(rule) => rule.declaration(),
        }
    }

    /// Whether a step takes a closure in place of gradients.
    pub fn needs_closure(&self) -> bool {
        matches!(self.method, Method::Closure(_))
    }

    /// Whether it runs on a GPU.
    pub fn has_shader(&self) -> bool {
        match self.method {
            Method::Elementwise(rule) => rule.shader().is_some(),
            // The vectors of closures are added and multiplied there, whatever the method.
            Method::Tensor(_) | Method::Closure(_) => true,
        }
    }

    /// Where it comes from.
    pub fn paper(&self) -> &'static str {
        self.paper.unwrap_or(self.declaration().paper)
    }

    /// The preset's defaults.
    pub fn hypers(&self) -> Hypers {
        let mut hypers = Hypers::new(self.declaration().hypers);
        for &(name, value) in self.defaults {
            hypers.set(self.name, name, value).expect("a preset's defaults are within the rule's ranges");
        }
        hypers
    }

    /// The slots that a parameter of this shape needs under these hyperparameters.
    pub fn needed_slots(&self, h: &Hypers, shape: &[usize]) -> SlotSet {
        match self.method {
            Method::Elementwise(rule) => SlotSet::of(rule.with_kernel(h, Facts).slots),
            Method::Tensor(_) | Method::Closure(_) => self.possible_slots(shape),
        }
    }

    /// The slots that a parameter of this shape needs under any hyperparameters.
    pub fn certain_slots(&self, shape: &[usize]) -> SlotSet {
        match self.method {
            Method::Elementwise(rule) => {
                let all = rule.kernels().into_iter().map(|k| SlotSet::of(k.slots));
                all.reduce(SlotSet::intersection).unwrap_or_default()
            }
            Method::Tensor(_) | Method::Closure(_) => self.possible_slots(shape),
        }
    }

    /// The slots that a parameter of this shape may ever have.
    pub fn possible_slots(&self, shape: &[usize]) -> SlotSet {
        let slots = 0..self.declaration().slots.len();
        slots.filter(|&k| self.slot_shape(k, shape).is_some()).fold(SlotSet::EMPTY, SlotSet::with)
    }

    /// Shape of slot k of a parameter; `None` where it has no such slot.
    pub fn slot_shape(&self, k: usize, shape: &[usize]) -> Option<Vec<usize>> {
        match self.method {
            Method::Elementwise(_) => Some(shape.to_vec()),
            Method::Tensor(rule) => rule.slot_shape(k, shape),
            Method::Closure(_) => None,
        }
    }

    /// Scalar slots before the first update.
    pub fn first_scalars(&self) -> ScalarSlots {
        let mut scalars = ScalarSlots::default();
        for (value, declared) in scalars.iter_mut().zip(self.declaration().scalars) {
            *value = declared.start;
        }
        scalars
    }

    /// The hyperparameters of a new group: what differs from the defaults, with every check.
    pub fn group(&self, place: &str, changes: &[(&str, Value)]) -> Result<Hypers> {
        let mut hypers = self.hypers();
        self.set(place, &mut hypers, changes)?;
        if let (Some(Value::None), Some(Value::Int(max_iter))) = (hypers.get("max_eval"), hypers.get("max_iter")) {
            // As in torch, where it then stays when max_iter changes.
            let max_eval = descent::default_max_eval(max_iter.unsigned_abs());
            hypers.set(place, "max_eval", Value::Int(i64::try_from(max_eval).unwrap_or(i64::MAX)))?;
        }
        Ok(hypers)
    }

    /// Sets hyperparameters with every check; on an error the old values stay.
    pub fn set(&self, place: &str, hypers: &mut Hypers, changes: &[(&str, Value)]) -> Result<()> {
        let mut changed = hypers.clone();
        for &(name, value) in changes {
            if self.fixed.contains(&name) && hypers.get(name) != Some(value) {
                let fixed = hypers.get(name).map_or_else(String::new, |v| v.to_string());
                return Err(Error::refuse(ErrorKind::Value, place, name, fixed, value));
            }
            changed.set(place, name, value)?;
        }
        if let Method::Elementwise(rule) = self.method {
            rule.validate(place, &changed)?;
        }
        *hypers = changed;
        Ok(())
    }
}
