//! Decay by a factor every few epochs.

use super::{At, Transition};
use crate::error::{Error, ErrorKind, Result};

/// `base · gamma^⌊epoch/size⌋`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    size: i64,
    gamma: f64,
}

impl Step {
    /// `size` epochs (at least 1) between decays by the factor `gamma`.
    pub fn new(size: i64, gamma: f64) -> Result<Self> {
        if size < 1 {
            return Err(Error::refuse(ErrorKind::Value, "StepLR", "step_size", "a whole number >= 1", size));
        }
        Ok(Self { size, gamma })
    }
}

impl Transition for Step {
    fn next(&self, at: At) -> f64 {
        if at.epoch == 0 || at.epoch % self.size != 0 { at.current } else { at.current * self.gamma }
    }

    fn closed(&self, base: f64, epoch: i64) -> f64 {
        base * libm::pow(self.gamma, epoch.div_euclid(self.size) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_below_one_is_refused() {
        assert!(Step::new(0, 0.5).is_err());
    }

    #[test]
    fn recursion_and_closed_form_agree() {
        let schedule = Step::new(3, 0.5).unwrap();
        let mut current = 0.8;
        for epoch in 0..30 {
            current = schedule.next(At { current, base: 0.8, epoch, initial: epoch == 0 });
            assert!((current - schedule.closed(0.8, epoch)).abs() < 1e-15);
        }
    }
}
