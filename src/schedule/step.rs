//! Decay by a factor every few epochs.

use super::{At, Transition};

/// `base · gamma^⌊epoch/size⌋`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Epochs between decays, ≥ 1.
    pub size: i64,
    /// Factor of each decay.
    pub gamma: f64,
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
    fn recursion_and_closed_form_agree() {
        let schedule = Step { size: 3, gamma: 0.5 };
        let mut current = 0.8;
        for epoch in 0..30 {
            current = schedule.next(At { current, base: 0.8, epoch, initial: epoch == 0 });
            assert!((current - schedule.closed(0.8, epoch)).abs() < 1e-15);
        }
    }
}
