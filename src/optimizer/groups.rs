//! Groups of hyperparameters, and what steps read off them.

use std::ops::Deref;

use crate::hyper::Hypers;
use crate::rule::{Decay, Facts, KernelFacts, Shared, SlotSet, decay};
use crate::rules::{Method, Preset};

/// What steps read off the hyperparameters of a group.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reading {
    /// How weight decay enters.
    decay: Decay,
    maximize: bool,
    /// The kernel and the slots it needs, of an elementwise rule.
    pub(super) kernel: Option<(KernelFacts, SlotSet)>,
    /// The first of the groups in a row that have the same hyperparameters: they share coefficients.
    pub(super) first_alike: usize,
}

impl Reading {
    /// The executor's scalars: what all groups have in common, decay and direction of this one.
    pub(super) fn shared(&self, common: Shared) -> Shared {
        Shared { maximize: self.maximize, decay: self.decay, ..common }
    }
}

/// The hyperparameters of all groups. What steps read off them is kept until one changes.
#[derive(Debug, Default)]
pub(super) struct Groups {
    hypers: Vec<Hypers>,
    readings: Vec<Reading>,
    changes: u64,
}

impl Deref for Groups {
    type Target = [Hypers];

    fn deref(&self) -> &[Hypers] {
        &self.hypers
    }
}

impl Groups {
    /// The hyperparameters, to change.
    pub(super) fn change(&mut self) -> &mut Vec<Hypers> {
        self.readings.clear();
        self.changes += 1;
        &mut self.hypers
    }

    /// How often they were changed.
    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    /// Reads what was not read since the last change.
    pub(super) fn read(&mut self, preset: &Preset) {
        for (group, h) in self.hypers.iter().enumerate().skip(self.readings.len()) {
            let kernel = match preset.method {
                Method::Elementwise(rule) => Some(rule.with_kernel(h, Facts)),
                Method::Tensor(_) | Method::Closure(_) => None,
            };
            let first_alike = match group.checked_sub(1) {
                Some(before) if self.hypers[before].is_identical(h) => self.readings[before].first_alike,
                _ => group,
            };
            self.readings.push(Reading {
                decay: decay(h),
                maximize: h.flag("maximize"),
                kernel: kernel.map(|facts| (facts, SlotSet::of(facts.slots))),
                first_alike,
            });
        }
    }

    /// What was read off a group.
    pub(super) fn reading(&self, group: usize) -> &Reading {
        &self.readings[group]
    }
}
