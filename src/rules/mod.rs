//! The registry: the one list of rules and presets.
//!
//! Whatever needs "all optimizers" iterates [`REGISTRY`].

pub mod adadelta;
pub mod adam;
pub mod adamax;
mod common;
pub mod radam;
pub mod sgd;

use crate::error::{Error, ErrorKind, Result};
use crate::hyper::{Hypers, Value};
use crate::rule::{Decay, Declaration, Facts, KernelFacts, KernelVisitor, MAX_COEFFICIENTS, Moment, Rule};

/// A named optimizer: a rule with its own defaults and fixed choices.
#[derive(Debug)]
pub struct Preset {
    /// torch's class name.
    pub name: &'static str,
    /// The rule.
    pub rule: RuleId,
    /// Defaults that differ from the rule's.
    pub defaults: &'static [(&'static str, Value)],
    /// Hyperparameters that this preset fixes: users cannot set them.
    pub fixed: &'static [&'static str],
    /// Where it comes from; the rule's paper where it has none of its own.
    pub paper: Option<&'static str>,
}

/// Every optimizer, in the order of the documentation.
pub static REGISTRY: &[Preset] = &[
    Preset { name: "SGD", rule: RuleId::Sgd, defaults: &[], fixed: &[], paper: None },
    Preset { name: "Adam", rule: RuleId::Adam, defaults: &[], fixed: &[], paper: None },
    Preset {
        name: "AdamW",
        rule: RuleId::Adam,
        defaults: &[("weight_decay", Value::Float(1e-2)), ("decoupled_weight_decay", Value::Bool(true))],
        fixed: &["decoupled_weight_decay"],
        paper: Some("Loshchilov, Hutter 2019, Decoupled weight decay regularization"),
    },
    Preset { name: "Adadelta", rule: RuleId::Adadelta, defaults: &[], fixed: &[], paper: None },
    Preset { name: "Adamax", rule: RuleId::Adamax, defaults: &[], fixed: &[], paper: None },
    Preset { name: "RAdam", rule: RuleId::RAdam, defaults: &[], fixed: &[], paper: None },
];

macro_rules! rules {
    ($($id:ident => $rule:ty, $shader:literal;)+) => {
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

            /// The rule's text for the GPU.
            pub fn shader(self) -> &'static str {
                match self { $(Self::$id => include_str!(concat!("../../shaders/rules/", $shader))),+ }
            }

            /// Conditions between hyperparameters.
            pub fn validate(self, place: &str, h: &Hypers) -> Result<()> {
                match self { $(Self::$id => <$rule>::validate(place, h)),+ }
            }

            /// The coefficients of one update.
            pub fn coefficients(self, h: &Hypers, at: Moment) -> [f64; MAX_COEFFICIENTS] {
                match self { $(Self::$id => <$rule>::coefficients(h, at)),+ }
            }

            /// How weight decay enters.
            pub fn decay(self, h: &Hypers) -> Decay {
                match self { $(Self::$id => <$rule>::decay(h)),+ }
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
    Adamax => adamax::Adamax, "adamax.wgsl";
    RAdam => radam::RAdam, "radam.wgsl";
}

impl Preset {
    /// Looks an optimizer up by its class name.
    pub fn find(name: &str) -> Result<&'static Self> {
        REGISTRY.iter().find(|p| p.name == name).ok_or_else(|| {
            let names: Vec<_> = REGISTRY.iter().map(|p| p.name).collect();
            Error::refuse(ErrorKind::Name, "roptim", "optimizer", format!("one of {}", names.join(", ")), name)
        })
    }

    /// The rule's declaration.
    pub fn declaration(&self) -> &'static Declaration {
        self.rule.declaration()
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

    /// The slots that these hyperparameters need: the first few of the declared ones.
    pub fn slot_count(&self, h: &Hypers) -> usize {
        self.rule.with_kernel(h, Facts).slots
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
        self.rule.validate(place, &changed)?;
        *hypers = changed;
        Ok(())
    }
}
