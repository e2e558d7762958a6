//! torch's schedulers as transitions from the current value to the next.
//!
//! A transition multiplies or shifts what it finds, so that several on one optimizer act together. [`Chain::closed`]
//! is the same schedule as a function of the epoch, where nothing else acts. Both are torch's, operation by
//! operation, what one may find odd included: the cosine rises again after `T_max`, a linear warmup over 0 epochs
//! stays at its start.

use std::f64::consts::PI;

use super::cycle::half_cosine;
use crate::error::{Error, ErrorKind, Result};

/// What a transition sees of one group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct At {
    /// The value before the transition.
    pub current: f64,
    /// The value the schedule started from.
    pub base: f64,
    /// The epoch that begins, 0 at construction.
    pub epoch: f64,
    /// Whether this is the transition at construction.
    pub initial: bool,
}

/// A schedule with its numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs, reason = "the fields are the arguments of torch's classes")]
pub enum Chain {
    /// A factor every few epochs.
    Step { step_size: f64, gamma: f64 },
    /// A factor `count` times at this epoch, `passed` times up to it.
    MultiStep { gamma: f64, count: f64, passed: f64 },
    /// A factor until an epoch.
    Constant { factor: f64, total_iters: f64 },
    /// Factors along a line.
    Linear { start_factor: f64, end_factor: f64, total_iters: f64 },
    /// A factor every epoch.
    Exponential { gamma: f64 },
    /// A power of what is left.
    Polynomial { total_iters: f64, power: f64 },
    /// Half a cosine (Loshchilov, Hutter: *SGDR*, ICLR 2017, without restarts).
    Cosine { t_max: f64, eta_min: f64 },
}

/// 1 or 0.
fn indicator(condition: bool) -> f64 {
    f64::from(u8::from(condition))
}

impl Chain {
    /// The schedule of torch's class of this name, numbers in the order of the fields.
    pub fn new(class: &str, numbers: &[f64]) -> Result<Self> {
        Ok(match (class, numbers) {
            ("StepLR", &[step_size, _]) if step_size < 1.0 => {
                return Err(Error::refuse(ErrorKind::Value, class, "step_size", "a whole number >= 1", step_size));
            }
            ("StepLR", &[step_size, gamma]) => Self::Step { step_size, gamma },
            ("MultiStepLR", &[gamma, count, passed]) => Self::MultiStep { gamma, count, passed },
            ("ConstantLR", &[factor, total_iters]) => Self::Constant { factor, total_iters },
            ("LinearLR", &[start_factor, end_factor, total_iters]) => {
                Self::Linear { start_factor, end_factor, total_iters }
            }
            ("ExponentialLR", &[gamma]) => Self::Exponential { gamma },
            ("PolynomialLR", &[total_iters, power]) => Self::Polynomial { total_iters, power },
            ("CosineAnnealingLR", &[t_max, eta_min]) => Self::Cosine { t_max, eta_min },
            _ => {
                let got = format!("{class} with {} numbers", numbers.len());
                return Err(Error::refuse(ErrorKind::Value, "lr_scheduler", "the schedule", "a known one", got));
            }
        })
    }

    /// The next value from the current one.
    pub fn next(&self, At { current, base, epoch, initial }: At) -> f64 {
        match *self {
            Self::Step { step_size, gamma } => {
                if epoch == 0.0 || epoch % step_size != 0.0 {
                    current
                } else {
                    current * gamma
                }
            }
            Self::MultiStep { gamma, count, .. } => {
                if count == 0.0 {
                    current
                } else {
                    current * libm::pow(gamma, count)
                }
            }
            Self::Constant { factor, total_iters } => {
                if epoch == 0.0 {
                    current * factor
                } else if epoch != total_iters {
                    current
                } else {
                    current * (1.0 / factor)
                }
            }
            Self::Linear { start_factor, end_factor, total_iters } => {
                let rise = end_factor - start_factor;
                if epoch == 0.0 {
                    current * start_factor
                } else if initial || epoch > total_iters {
                    current
                } else {
                    current * (1.0 + rise / (total_iters * start_factor + (epoch - 1.0) * rise))
                }
            }
            Self::Exponential { gamma } => {
                if initial {
                    current
                } else {
                    current * gamma
                }
            }
            Self::Polynomial { total_iters, power } => {
                if initial || epoch > total_iters {
                    current
                } else {
                    let left = (1.0 - epoch / total_iters) / (1.0 - (epoch - 1.0) / total_iters);
                    current * libm::pow(left, power)
                }
            }
            Self::Cosine { t_max, eta_min } => {
                if initial {
                    current
                } else if (epoch - 1.0 - t_max).rem_euclid(2.0 * t_max) == 0.0 {
                    // At the bottom the ratio below is 0/0.
                    current + (base - eta_min) * (1.0 - libm::cos(PI / t_max)) / 2.0
                } else {
                    (1.0 + libm::cos(PI * epoch / t_max)) / (1.0 + libm::cos(PI * (epoch - 1.0) / t_max))
                        * (current - eta_min)
                        + eta_min
                }
            }
        }
    }

    /// The value at an epoch from the base value alone.
    pub fn closed(&self, base: f64, epoch: f64) -> f64 {
        match *self {
            Self::Step { step_size, gamma } => base * libm::pow(gamma, libm::floor(epoch / step_size)),
            Self::MultiStep { gamma, passed, .. } => base * libm::pow(gamma, passed),
            Self::Constant { factor, total_iters } => {
                base * (factor + indicator(epoch >= total_iters) * (1.0 - factor))
            }
            Self::Linear { start_factor, end_factor, total_iters } => {
                let rise = end_factor - start_factor;
                base * (start_factor + rise * total_iters.min(epoch) / total_iters)
            }
            Self::Exponential { gamma } => base * libm::pow(gamma, epoch),
            Self::Polynomial { total_iters, power } => {
                base * libm::pow(1.0 - total_iters.min(epoch) / total_iters, power)
            }
            Self::Cosine { t_max, eta_min } => half_cosine(base, eta_min, epoch, t_max),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recursion_and_closed_form_agree() {
        let cases: [(&str, &[f64]); 6] = [
            ("StepLR", &[3.0, 0.5]),
            ("ConstantLR", &[0.25, 4.0]),
            ("LinearLR", &[0.1, 0.8, 7.0]),
            ("ExponentialLR", &[0.9]),
            ("PolynomialLR", &[9.0, 2.5]),
            ("CosineAnnealingLR", &[7.0, 0.01]),
        ];
        for (class, numbers) in cases {
            let schedule = Chain::new(class, numbers).unwrap();
            let mut current = 0.8;
            for epoch in 0..40 {
                let epoch = f64::from(epoch);
                current = schedule.next(At { current, base: 0.8, epoch, initial: epoch == 0.0 });
                let closed = schedule.closed(0.8, epoch);
                assert!((current - closed).abs() < 1e-12, "{class} epoch {epoch}: {current} {closed}");
            }
        }
        assert!(Chain::new("StepLR", &[0.0, 0.5]).is_err());
        assert!(Chain::new("StepLR", &[1.0]).is_err() && Chain::new("Step", &[1.0, 2.0]).is_err());
    }
}
