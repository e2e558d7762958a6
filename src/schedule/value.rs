//! Schedules as values: functions of the count of updates.
//!
//! Update number t, from 0, uses `schedule(t)`. A schedule with a length n goes from its first value at t = 0 to its
//! last at t = n, and holds that from there on. [`Schedule::then`] follows one of length n by another, whose own t
//! begins at n: at the boundary the second one speaks.
//!
//! ```
//! use roptim::schedule::value::Schedule;
//!
//! let warmup = Schedule::Linear { start: 0.0, end: 1.0, steps: 500 };
//! let decay = Schedule::Cosine { peak: 1.0, floor: 0.01, steps: 9500 };
//! let lr = warmup.then(decay)?.scaled(1e-3);
//! assert_eq!((lr.at(0), lr.at(500)), (0.0, 1e-3));
//! assert!((lr.at(10_000) - 1e-5).abs() < 1e-18 && lr.at(20_000) == lr.at(10_000));
//! let text = serde_json::to_string(&lr).unwrap();
//! assert_eq!(serde_json::from_str::<Schedule>(&text).unwrap(), lr);
//! # Ok::<(), roptim::Error>(())
//! ```

use serde::{Deserialize, Serialize};

use super::cycle::{Anneal, Cycles, between, half_cosine, one_cycle, triangle};
use crate::error::{Error, ErrorKind, Result};

/// A function of the count of updates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// Always the same value; `steps` is its length where something is to follow.
    Constant {
        /// The value.
        value: f64,
        /// Updates, or no end.
        steps: Option<u64>,
    },
    /// A line.
    Linear {
        /// First value.
        start: f64,
        /// Last value.
        end: f64,
        /// Updates.
        steps: u64,
    },
    /// `floor + (peak − floor)·(1 − t/steps)^power`.
    Polynomial {
        /// First value.
        peak: f64,
        /// Last value.
        floor: f64,
        /// Updates.
        steps: u64,
        /// Power.
        power: f64,
    },
    /// `start·gamma^t`.
    Exponential {
        /// First value.
        start: f64,
        /// Factor of each update.
        gamma: f64,
        /// Updates, or no end.
        steps: Option<u64>,
    },
    /// `start·gamma^⌊t/every⌋`.
    Step {
        /// First value.
        start: f64,
        /// Updates between factors.
        every: u64,
        /// The factor.
        gamma: f64,
    },
    /// `floor + (peak − floor)·(1 + cos(π·t/steps))/2`.
    Cosine {
        /// First value.
        peak: f64,
        /// Last value.
        floor: f64,
        /// Updates.
        steps: u64,
    },
    /// `floor + (peak − floor)·(1 − √(t/steps))`.
    SqrtDecay {
        /// First value.
        peak: f64,
        /// Last value.
        floor: f64,
        /// Updates.
        steps: u64,
    },
    /// `peak·√(timescale/(timescale + t))`.
    InverseSqrt {
        /// First value.
        peak: f64,
        /// Updates until it has fallen by √2.
        timescale: u64,
    },
    /// Half cosines one after another, each `mult` times as long as the one before.
    WarmRestarts {
        /// First value of each.
        peak: f64,
        /// Where each ends.
        floor: f64,
        /// Updates of the first.
        first: u64,
        /// Growth of the length.
        mult: u64,
    },
    /// Up and down once, then far down.
    OneCycle {
        /// Largest value.
        peak: f64,
        /// Updates.
        steps: u64,
        /// Part of them that goes up.
        pct_start: f64,
        /// First value: the peak divided by this.
        div_factor: f64,
        /// Last value: the first divided by this.
        final_div_factor: f64,
        /// Whether it comes down to the first value before the end.
        three_phase: bool,
        /// The curve.
        anneal: Anneal,
    },
    /// Triangles.
    Cyclic {
        /// Lowest value.
        base: f64,
        /// Highest value.
        peak: f64,
        /// Updates up.
        up: u64,
        /// Updates down.
        down: u64,
        /// How they change.
        mode: Cycles,
        /// The factor of `exp_range`.
        gamma: f64,
    },
    /// Values at some updates: lines between them, or each until the next.
    Piecewise {
        /// `(t, value)`, t ascending from 0.
        points: Vec<(u64, f64)>,
        /// Whether lines join them.
        lines: bool,
    },
    /// One after another.
    Sequence(Vec<Schedule>),
    /// The product of all.
    Product(Vec<Schedule>),
    /// Another, kept within bounds.
    Clip {
        /// The other.
        of: Box<Schedule>,
        /// Lower bound, if any.
        low: Option<f64>,
        /// Upper bound, if any.
        high: Option<f64>,
    },
    /// Another, `by` updates later, or earlier where negative; before its start its first value.
    Shift {
        /// The other.
        of: Box<Schedule>,
        /// How much later.
        by: i64,
    },
}

/// Most schedules within schedules: what a reader of JSON still takes.
const MAX_DEPTH: usize = 60;

impl Schedule {
    /// Refuses numbers that no schedule has: not finite, of no length, ends that do not fit.
    pub fn check(&self) -> Result<()> {
        self.check_within(MAX_DEPTH)
    }

    fn check_within(&self, depth: usize) -> Result<()> {
        let name = self.name();
        let refuse = |what: &str, allowed: &str, got: String| {
            Err(Error::refuse(ErrorKind::Value, format!("schedules.{name}"), what, allowed, got))
        };
        if depth == 0 {
            return refuse("schedules within it", "within 60 of each other", "one more".into());
        }
        for (what, x) in self.numbers() {
            if !x.is_finite() {
                return refuse(what, "a finite number", x.to_string());
            }
        }
        for (what, n) in self.lengths() {
            if n == 0 {
                return refuse(what, "a whole number >= 1", n.to_string());
            }
        }
        match self {
            Self::Polynomial { power, .. } if *power < 0.0 => refuse("power", "a number >= 0", power.to_string()),
            Self::Exponential { gamma, .. } | Self::Step { gamma, .. } | Self::Cyclic { gamma, .. } if *gamma < 0.0 => {
                refuse("gamma", "a number >= 0", gamma.to_string())
            }
            Self::OneCycle { steps, pct_start, div_factor, final_div_factor, three_phase, .. } => {
                let (peak_at, end) = (pct_start * *steps as f64 - 1.0, *steps as f64 - 1.0);
                let before_end = if *three_phase { 2.0 * peak_at } else { peak_at };
                if !(peak_at > 0.0 && before_end < end) {
                    let allowed = "a part of the steps that leaves each phase some";
                    return refuse("pct_start", allowed, format!("{pct_start} of {steps}"));
                }
                for (what, x) in [("div_factor", *div_factor), ("final_div_factor", *final_div_factor)] {
                    if x <= 0.0 {
                        return refuse(what, "a number > 0", x.to_string());
                    }
                }
                Ok(())
            }
            Self::Piecewise { points, .. } => {
                if points.first().is_none_or(|point| point.0 != 0) || points.windows(2).any(|w| w[0].0 >= w[1].0) {
                    return refuse("points", "pairs (t, value) with t ascending from 0", format!("{points:?}"));
                }
                Ok(())
            }
            Self::Sequence(parts) => {
                let Some((_, others)) = parts.split_last() else {
                    return refuse("schedules", "at least one", "none".into());
                };
                if let Some(endless) = others.iter().find(|part| part.length().is_none()) {
                    return refuse(
                        "schedules but the last",
                        "of some length",
                        format!("an endless {}", endless.name()),
                    );
                }
                parts.iter().try_for_each(|part| part.check_within(depth - 1))
            }
            Self::Product(parts) if parts.is_empty() => refuse("factors", "at least one", "none".into()),
            Self::Product(parts) => parts.iter().try_for_each(|part| part.check_within(depth - 1)),
            Self::Clip { of, low, high } => {
                if let (Some(low), Some(high)) = (low, high)
                    && low > high
                {
                    return refuse("low", "at most high", format!("{low} and {high}"));
                }
                of.check_within(depth - 1)
            }
            Self::Shift { of, .. } => of.check_within(depth - 1),
            _ => Ok(()),
        }
    }

    /// What messages call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Constant { .. } => "constant",
            Self::Linear { .. } => "linear",
            Self::Polynomial { .. } => "polynomial",
            Self::Exponential { .. } => "exponential",
            Self::Step { .. } => "step",
            Self::Cosine { .. } => "cosine",
            Self::SqrtDecay { .. } => "sqrt_decay",
            Self::InverseSqrt { .. } => "inverse_sqrt",
            Self::WarmRestarts { .. } => "warm_restarts",
            Self::OneCycle { .. } => "one_cycle",
            Self::Cyclic { .. } => "cyclic",
            Self::Piecewise { .. } => "piecewise",
            Self::Sequence(_) => "sequence",
            Self::Product(_) => "product",
            Self::Clip { .. } => "clip",
            Self::Shift { .. } => "shift",
        }
    }

    fn numbers(&self) -> Vec<(&'static str, f64)> {
        match self {
            Self::Constant { value, .. } => vec![("value", *value)],
            Self::Linear { start, end, .. } => vec![("start", *start), ("end", *end)],
            Self::Polynomial { peak, floor, power, .. } => vec![("peak", *peak), ("floor", *floor), ("power", *power)],
            Self::Exponential { start, gamma, .. } | Self::Step { start, gamma, .. } => {
                vec![("start", *start), ("gamma", *gamma)]
            }
            Self::Cosine { peak, floor, .. }
            | Self::SqrtDecay { peak, floor, .. }
            | Self::WarmRestarts { peak, floor, .. } => vec![("peak", *peak), ("floor", *floor)],
            Self::InverseSqrt { peak, .. } => vec![("peak", *peak)],
            Self::OneCycle { peak, pct_start, div_factor, final_div_factor, .. } => vec![
                ("peak", *peak),
                ("pct_start", *pct_start),
                ("div_factor", *div_factor),
                ("final_div_factor", *final_div_factor),
            ],
            Self::Cyclic { base, peak, gamma, .. } => vec![("base", *base), ("peak", *peak), ("gamma", *gamma)],
            Self::Piecewise { points, .. } => points.iter().map(|&(_, value)| ("points", value)).collect(),
            Self::Clip { low, high, .. } => {
                low.map(|low| ("low", low)).into_iter().chain(high.map(|high| ("high", high))).collect()
            }
            Self::Sequence(_) | Self::Product(_) | Self::Shift { .. } => Vec::new(),
        }
    }

    fn lengths(&self) -> Vec<(&'static str, u64)> {
        match *self {
            Self::Constant { steps: Some(steps), .. } | Self::Exponential { steps: Some(steps), .. } => {
                vec![("steps", steps)]
            }
            Self::Linear { steps, .. }
            | Self::Polynomial { steps, .. }
            | Self::Cosine { steps, .. }
            | Self::SqrtDecay { steps, .. }
            | Self::OneCycle { steps, .. } => vec![("steps", steps)],
            Self::Step { every, .. } => vec![("every", every)],
            Self::InverseSqrt { timescale, .. } => vec![("timescale", timescale)],
            Self::WarmRestarts { first, mult, .. } => vec![("first", first), ("mult", mult)],
            Self::Cyclic { up, down, .. } => vec![("up", up), ("down", down)],
            _ => Vec::new(),
        }
    }

    /// The update from which on it holds its last value; none where it has no end.
    pub fn length(&self) -> Option<u64> {
        match self {
            Self::Constant { steps, .. } | Self::Exponential { steps, .. } => *steps,
            Self::Linear { steps, .. }
            | Self::Polynomial { steps, .. }
            | Self::Cosine { steps, .. }
            | Self::SqrtDecay { steps, .. }
            | Self::OneCycle { steps, .. } => Some(*steps),
            Self::Step { .. } | Self::InverseSqrt { .. } | Self::WarmRestarts { .. } | Self::Cyclic { .. } => None,
            Self::Piecewise { points, .. } => points.last().map(|point| point.0),
            Self::Sequence(parts) => parts.iter().try_fold(0u64, |n, part| Some(n.saturating_add(part.length()?))),
            Self::Product(parts) if parts.iter().all(Self::is_number) => None,
            Self::Product(parts) => {
                let curves = parts.iter().filter(|part| !part.is_number());
                curves.into_iter().try_fold(0, |n, part| Some(part.length()?.max(n)))
            }
            Self::Clip { of, .. } => of.length(),
            Self::Shift { of, by } => Some(of.length()?.saturating_add_signed(*by)),
        }
    }

    /// Whether it is a number, which has no length of its own in a product.
    fn is_number(&self) -> bool {
        matches!(self, Self::Constant { steps: None, .. })
    }

    /// The value of update `t`.
    pub fn at(&self, t: u64) -> f64 {
        let x = |steps: u64| t.min(steps) as f64 / steps as f64;
        match self {
            Self::Constant { value, .. } => *value,
            Self::Linear { start, end, steps } => {
                if t >= *steps {
                    *end
                } else {
                    between(*start, *end, x(*steps))
                }
            }
            Self::Polynomial { peak, floor, steps, power } => {
                between(*floor, *peak, libm::pow(1.0 - x(*steps), *power))
            }
            Self::Exponential { start, gamma, steps } => {
                times(*start, libm::pow(*gamma, steps.map_or(t, |steps| t.min(steps)) as f64))
            }
            Self::Step { start, every, gamma } => times(*start, libm::pow(*gamma, (t / every) as f64)),
            Self::Cosine { peak, floor, steps } => {
                if t >= *steps {
                    *floor
                } else {
                    half_cosine(*peak, *floor, t as f64, *steps as f64)
                }
            }
            Self::SqrtDecay { peak, floor, steps } => between(*floor, *peak, 1.0 - libm::sqrt(x(*steps))),
            Self::InverseSqrt { peak, timescale } => {
                let timescale = *timescale as f64;
                peak * libm::sqrt(timescale / (timescale + t as f64))
            }
            Self::WarmRestarts { peak, floor, first, mult } => {
                let (begun, length) = restart(t, *first, *mult);
                half_cosine(*peak, *floor, begun as f64, length as f64)
            }
            Self::OneCycle { peak, steps, pct_start, div_factor, final_div_factor, three_phase, anneal } => {
                let first = peak / div_factor;
                let last = first / final_div_factor;
                let knots: &[f64] = if *three_phase { &[first, *peak, first, last] } else { &[first, *peak, last] };
                let t = t.min(steps.saturating_sub(1)) as f64;
                one_cycle(t, *steps as f64, *pct_start, *anneal, knots)
            }
            Self::Cyclic { base, peak, up, down, mode, gamma } => {
                let t = t as f64;
                let (cycle, height) = triangle(t, *up as f64, *down as f64);
                base + times((peak - base) * height, mode.scale(t, cycle, *gamma))
            }
            Self::Piecewise { points, lines } => {
                let next = points.partition_point(|point| point.0 <= t);
                match (points.get(next.saturating_sub(1)), points.get(next)) {
                    (Some(&(from, a)), Some(&(to, b))) if *lines => {
                        between(a, b, (t - from) as f64 / (to - from) as f64)
                    }
                    (Some(&(_, a)), _) => a,
                    (None, _) => f64::NAN,
                }
            }
            Self::Sequence(parts) => {
                let mut t = t;
                for (i, part) in parts.iter().enumerate() {
                    match part.length() {
                        Some(n) if t >= n && i + 1 < parts.len() => t -= n,
                        _ => return part.at(t),
                    }
                }
                f64::NAN
            }
            Self::Product(parts) => parts.iter().map(|part| part.at(t)).product(),
            Self::Clip { of, low, high } => {
                let value = of.at(t);
                let value = low.map_or(value, |low| if value < low { low } else { value });
                high.map_or(value, |high| if value > high { high } else { value })
            }
            Self::Shift { of, by } => of.at(t.saturating_add_signed(by.saturating_neg())),
        }
    }

    /// This schedule and then another. Refused where this one has no end.
    pub fn then(self, next: Self) -> Result<Self> {
        let mut parts = self.parts();
        parts.extend(next.parts());
        let sequence = Self::Sequence(parts);
        sequence.check()?;
        Ok(sequence)
    }

    fn parts(self) -> Vec<Self> {
        if let Self::Sequence(parts) = self { parts } else { vec![self] }
    }

    /// The product of both.
    pub fn times(self, other: Self) -> Result<Self> {
        let factors = |schedule| if let Self::Product(factors) = schedule { factors } else { vec![schedule] };
        let mut all = factors(self);
        all.extend(factors(other));
        let product = Self::Product(all);
        product.check()?;
        Ok(product)
    }

    /// This schedule times a number.
    pub fn scaled(self, factor: f64) -> Self {
        Self::Product(vec![self, Self::Constant { value: factor, steps: None }])
    }
}

/// The product, 0 where the first factor is, however large the second has grown.
fn times(a: f64, grown: f64) -> f64 {
    if a == 0.0 { a } else { a * grown }
}

/// Within warm restarts: updates since the last restart, and the length of the run.
fn restart(t: u64, first: u64, mult: u64) -> (u64, u64) {
    if mult == 1 {
        return (t % first, first);
    }
    let (mut begun, mut length) = (t, first);
    while begun >= length {
        begun -= length;
        length = length.saturating_mul(mult);
    }
    (begun, length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn leaf() -> impl Strategy<Value = Schedule> {
        let (x, n) = (-2.0..2.0f64, 1u64..20);
        prop_oneof![
            (x.clone(), n.clone()).prop_map(|(value, n)| Schedule::Constant { value, steps: Some(n) }),
            (x.clone(), x.clone(), n.clone()).prop_map(|(start, end, steps)| Schedule::Linear { start, end, steps }),
            (x.clone(), x.clone(), n.clone(), 0.0..3.0).prop_map(|(peak, floor, steps, power)| Schedule::Polynomial {
                peak,
                floor,
                steps,
                power
            }),
            (x.clone(), 0.0..1.5, n.clone()).prop_map(|(start, gamma, n)| Schedule::Exponential {
                start,
                gamma,
                steps: Some(n)
            }),
            (x.clone(), x.clone(), n.clone()).prop_map(|(peak, floor, steps)| Schedule::Cosine { peak, floor, steps }),
            (x.clone(), x.clone(), n.clone()).prop_map(|(peak, floor, steps)| Schedule::SqrtDecay {
                peak,
                floor,
                steps
            }),
            (x.clone(), 10u64..40, any::<bool>(), any::<bool>()).prop_map(|(peak, steps, three_phase, linear)| {
                let anneal = if linear { Anneal::Linear } else { Anneal::Cos };
                Schedule::OneCycle {
                    peak,
                    steps,
                    pct_start: 0.3,
                    div_factor: 25.0,
                    final_div_factor: 1e4,
                    three_phase,
                    anneal,
                }
            }),
            (x.clone(), prop::collection::vec((1u64..5, x), 1..5), any::<bool>()).prop_map(|(first, steps, lines)| {
                let mut t = 0;
                let mut points = vec![(0, first)];
                for (gap, value) in steps {
                    t += gap;
                    points.push((t, value));
                }
                Schedule::Piecewise { points, lines }
            }),
        ]
    }

    fn tree() -> impl Strategy<Value = Schedule> {
        leaf().prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                (inner.clone(), inner.clone()).prop_map(|(a, b)| a.then(b).unwrap()),
                (inner.clone(), inner.clone()).prop_map(|(a, b)| a.times(b).unwrap()),
                (inner.clone(), -3.0..3.0f64).prop_map(|(a, factor)| a.scaled(factor)),
                (inner.clone(), -1.0..0.0f64, 0.0..1.0f64).prop_map(|(of, low, high)| Schedule::Clip {
                    of: of.into(),
                    low: Some(low),
                    high: Some(high)
                }),
                (inner, -5i64..10).prop_map(|(of, by)| Schedule::Shift { of: of.into(), by }),
            ]
        })
    }

    proptest! {
        #[test]
        fn text_and_back(schedule in tree()) {
            schedule.check().unwrap();
            let text = serde_json::to_string(&schedule).unwrap();
            prop_assert_eq!(&serde_json::from_str::<Schedule>(&text).unwrap(), &schedule);
        }

        #[test]
        fn the_last_value_holds(schedule in tree(), beyond in 0u64..1000) {
            let n = schedule.length().unwrap();
            prop_assert_eq!(schedule.at(n + beyond), schedule.at(n));
            prop_assert!(schedule.at(u64::MAX).is_finite());
        }

        #[test]
        fn then_hands_over_at_the_length(a in tree(), b in tree(), c in tree(), t in 0u64..200) {
            let n = a.length().unwrap();
            let both = a.clone().then(b.clone()).unwrap();
            prop_assert_eq!(both.at(t), if t < n { a.at(t) } else { b.at(t - n) });
            // Nesting is transparent.
            let left = both.then(c.clone()).unwrap();
            let right = a.then(b.then(c).unwrap()).unwrap();
            prop_assert_eq!(left, right);
        }

        #[test]
        fn shifts_and_products(a in tree(), b in tree(), by in 0u64..30, t in 0u64..100) {
            let later = Schedule::Shift { of: a.clone().into(), by: by as i64 };
            prop_assert_eq!(later.at(t + by), a.at(t));
            prop_assert_eq!(later.at(by.saturating_sub(1)), a.at(0));
            let earlier = Schedule::Shift { of: a.clone().into(), by: -(by as i64) };
            prop_assert_eq!(earlier.at(t), a.at(t + by));
            let (one, other) = (a.clone().times(b.clone()).unwrap().at(t), a.at(t) * b.at(t));
            prop_assert!((one - other).abs() <= 1e-12 * other.abs());
        }

        #[test]
        fn restarts_count_as_a_loop_does(t in 0u64..5000, first in 1u64..30, mult in 1u64..4) {
            let (mut begun, mut length) = (0, first);
            for _ in 0..t {
                begun += 1;
                if begun == length {
                    (begun, length) = (0, length * mult);
                }
            }
            prop_assert_eq!(restart(t, first, mult), (begun, length));
        }
    }

    #[test]
    fn ends_are_exact() {
        let cosine = Schedule::Cosine { peak: 0.3, floor: 1e-5, steps: 7 };
        assert_eq!((cosine.at(0), cosine.at(7), cosine.at(100)), (0.3, 1e-5, 1e-5));
        let wide = Schedule::Cosine { peak: 1e308, floor: -1.7e308, steps: 10 };
        assert_eq!((wide.at(0), wide.at(10)), (1e308, -1.7e308));
        let line = Schedule::Linear { start: 0.1, end: 0.7, steps: 3 };
        assert_eq!((line.at(0), line.at(3)), (0.1, 0.7));
        let noam = Schedule::InverseSqrt { peak: 2.0, timescale: 400 };
        assert_eq!((noam.at(0), noam.at(1200)), (2.0, 1.0));
        assert!(Schedule::WarmRestarts { peak: 1.0, floor: 0.0, first: 4, mult: 2 }.at(u64::MAX).is_finite());
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let message = |schedule: Schedule| schedule.check().unwrap_err().to_string();
        let line = |steps| Schedule::Linear { start: 0.0, end: 1.0, steps };
        assert_eq!(message(line(0)), "schedules.linear: steps must be a whole number >= 1, got 0");
        let endless = Schedule::InverseSqrt { peak: 1.0, timescale: 4 };
        assert_eq!(
            endless.then(line(3)).unwrap_err().to_string(),
            "schedules.sequence: schedules but the last must be of some length, got an endless inverse_sqrt"
        );
        let cosine = Schedule::Cosine { peak: f64::NAN, floor: 0.0, steps: 1 };
        assert_eq!(message(cosine.scaled(2.0)), "schedules.cosine: peak must be a finite number, got NaN");
        let points = Schedule::Piecewise { points: vec![(0, 1.0), (0, 2.0)], lines: true };
        assert!(message(points).contains("with t ascending from 0"));
        let mut deep = line(1);
        for _ in 0..70 {
            deep = Schedule::Shift { of: deep.into(), by: 0 };
        }
        assert!(message(deep).contains("within 60 of each other"));
        assert_eq!(Schedule::Sequence(vec![]).check().unwrap_err().kind(), ErrorKind::Value);
    }
}
