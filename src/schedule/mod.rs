//! Learning-rate schedules: pure functions.
//!
//! | file | holds |
//! |---|---|
//! | [`chain`] | torch's recursions: the next value from the current one, so that several can be chained |
//! | [`cycle`] | curves that several schedules share: annealing, triangles, one-cycle |
//! | [`plateau`] | reduction when a metric stops improving |
//! | [`value`] | schedules as values: functions of the count of updates, composed and serialized |
//!
//! The Python classes keep the state of the first three and apply them, group by group.

pub mod chain;
pub mod cycle;
pub mod plateau;
pub mod value;
