//! Learning-rate transitions, one file per family.
//!
//! A transition is a pure function of the current value, the base value and the epoch; the Python classes
//! keep the state and apply it, group by group.

pub mod cosine;
pub mod plateau;
pub mod step;

/// What a transition sees of one group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct At {
    /// The value before the transition.
    pub current: f64,
    /// The value the schedule started from.
    pub base: f64,
    /// The epoch that begins, 0 at construction.
    pub epoch: i64,
    /// Whether this is the transition at construction.
    pub initial: bool,
}

/// A schedule in torch's two forms.
pub trait Transition {
    /// The next value from the current one: chainable with other schedules.
    fn next(&self, at: At) -> f64;

    /// The value at an epoch from the base value alone.
    fn closed(&self, base: f64, epoch: i64) -> f64;
}
