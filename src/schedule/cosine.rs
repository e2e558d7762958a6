//! Cosine annealing (Loshchilov, Hutter: *SGDR*, ICLR 2017, without restarts).

use std::f64::consts::PI;

use super::{At, Transition};

/// `η_min + (base − η_min)·(1 + cos(π·epoch/T_max))/2`. After `T_max` it rises again, as torch's does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cosine {
    /// Epochs of half a period, ≥ 1.
    pub t_max: f64,
    /// The lowest value.
    pub eta_min: f64,
}

impl Transition for Cosine {
    fn next(&self, at: At) -> f64 {
        let Self { t_max, eta_min } = *self;
        let e = at.epoch as f64;
        if at.initial {
            at.current
        } else if (e - 1.0 - t_max).rem_euclid(2.0 * t_max) == 0.0 {
            // At the bottom the ratio below is 0/0.
            at.current + (at.base - eta_min) * (1.0 - libm::cos(PI / t_max)) / 2.0
        } else {
            (1.0 + libm::cos(PI * e / t_max)) / (1.0 + libm::cos(PI * (e - 1.0) / t_max)) * (at.current - eta_min)
                + eta_min
        }
    }

    fn closed(&self, base: f64, epoch: i64) -> f64 {
        self.eta_min + (base - self.eta_min) * (1.0 + libm::cos(PI * epoch as f64 / self.t_max)) / 2.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recursion_and_closed_form_agree_past_the_bottom() {
        let schedule = Cosine { t_max: 7.0, eta_min: 0.01 };
        let mut current = 0.8;
        for epoch in 0..40 {
            current = schedule.next(At { current, base: 0.8, epoch, initial: epoch == 0 });
            assert!((current - schedule.closed(0.8, epoch)).abs() < 1e-12, "epoch {epoch}");
        }
    }
}
