//! L-BFGS.
//!
//! Liu, Nocedal: *On the limited memory BFGS method for large scale optimization*, Mathematical
//! Programming 45, 1989. With the last k pairs s = xᵢ₊₁ − xᵢ, y = gᵢ₊₁ − gᵢ and ρ = 1/(y·s), the direction
//! d = −H·g comes from the two-loop recursion:
//!
//! ```text
//! q = −g
//! newest to oldest:  αᵢ = ρᵢ·(sᵢ·q);   q ← q − αᵢ·yᵢ
//! r = γ·q,           γ = (y·s)/(y·y) of the newest pair
//! oldest to newest:  r ← r + (αᵢ − ρᵢ·(yᵢ·r))·sᵢ
//! d = r
//! ```
//!
//! | symbol | torch's name |
//! |---|---|
//! | y, s, ρ | state `old_dirs`, `old_stps`, `ro` |
//! | γ | state `H_diag` |
//! | α | state `al` |
//! | k | `history_size` |
//!
//! Directions and steps in torch's order: a pair is kept only where y·s > 1e-10, the first step is
//! min(1, 1/Σ|g|)·lr, later ones begin at lr, and without strong Wolfe search they are lr.
//!
//! Deviations from torch, besides those of [`descent`](super::descent): a smaller `history_size` than the
//! state's drops the oldest pairs (torch keeps them and grows on), and 0 counts as 1.

use std::collections::VecDeque;

use super::descent::{Descent, Last, Method};
use super::parts::{Part, Parts};
use super::vector::{HostVector, Reduction, Vector};
use crate::error::Result;

/// L-BFGS over one flat vector on the CPU.
pub type Lbfgs<F> = Descent<HostVector<F>, History<HostVector<F>>>;
/// Settings of a step.
pub type Settings = super::descent::Settings<Options>;
/// What outlives a step.
pub type State<V> = super::descent::State<V, History<V>>;

/// Longest list that is filled up with None.
const MAX_FILLED: usize = 10_000;
/// The least y·s of a pair worth keeping.
const MIN_CURVATURE: f64 = 1e-10;

/// What a user chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Pairs to remember.
    pub history_size: usize,
    /// Whether to search for steps.
    pub strong_wolfe: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { history_size: 100, strong_wolfe: false }
    }
}

/// A step and what it did to the gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair<V> {
    /// Difference of gradients.
    pub y: V,
    /// Difference of points.
    pub s: V,
    /// 1/(y·s).
    pub ro: f64,
}

/// The pairs, oldest first.
#[derive(Debug, Clone, PartialEq)]
pub struct History<V> {
    /// At most `history_size`.
    pub pairs: VecDeque<Pair<V>>,
    /// γ.
    pub h_diag: f64,
    /// α of each pair in the last recursion: scratch that torch shows.
    pub al: Vec<f64>,
}

impl<V> Default for History<V> {
    fn default() -> Self {
        Self { pairs: VecDeque::new(), h_diag: 1.0, al: Vec::new() }
    }
}

impl<V: Vector> Method<V> for History<V> {
    type Options = Options;
    const NAME: &'static str = "LBFGS";
    const CURVATURE: f64 = 0.9;

    fn searches(options: &Options) -> bool {
        options.strong_wolfe
    }

    fn direction(&mut self, options: &Options, last: &Last<V>, g: &V) -> V {
        let y = g.minus(&last.prev_flat_grad);
        let mut s = last.d.clone();
        s.scale(last.t);
        let [ys, yy] = V::reduce([Reduction::Dot(&y, &s), Reduction::Dot(&y, &y)]);
        if ys > MIN_CURVATURE {
            let room = options.history_size.max(1) - 1;
            self.pairs.drain(..self.pairs.len().saturating_sub(room));
            self.h_diag = ys / yy;
            self.pairs.push_back(Pair { y, s, ro: 1.0 / ys });
        }

        self.al = vec![0.0; self.pairs.len()];
        let mut q = g.negative();
        for (Pair { y, s, ro }, al) in self.pairs.iter().zip(&mut self.al).rev() {
            *al = s.dot(&q) * ro;
            q.add_scaled(-*al, y);
        }
        let mut r = q;
        r.scale(self.h_diag);
        for (Pair { y, s, ro }, al) in self.pairs.iter().zip(&self.al) {
            let be = y.dot(&r) * ro;
            r.add_scaled(al - be, s);
        }
        r
    }

    fn trial_step(lr: f64, _last: &Last<V>, _slope: f64) -> Option<f64> {
        Some(lr)
    }

    fn parts(&self, options: &Options) -> Vec<(&'static str, Part<V>)> {
        let list = |of: fn(&Pair<V>) -> Part<V>| Part::List(self.pairs.iter().map(of).collect());
        let mut parts = vec![
            ("old_dirs", list(|pair| Part::Vector(pair.y.clone()))),
            ("old_stps", list(|pair| Part::Vector(pair.s.clone()))),
            ("ro", list(|pair| Part::Number(pair.ro))),
            ("H_diag", Part::Number(self.h_diag)),
        ];
        if !self.al.is_empty() {
            // torch fills its list up to the history's size, however large.
            let mut al: Vec<_> = self.al.iter().map(|&al| Part::Number(al)).collect();
            al.resize(options.history_size.min(MAX_FILLED).max(al.len()), Part::None);
            parts.push(("al", Part::List(al)));
        }
        parts
    }

    fn from_parts(parts: &mut Parts<V>) -> Result<Self> {
        let (y, s) = (parts.vectors("old_dirs")?, parts.vectors("old_stps")?);
        let (ro, h_diag, al) = (parts.numbers("ro")?, parts.number("H_diag")?, parts.numbers("al")?);
        let pairs = ("old_dirs", y.len());
        parts.same_length([("old_stps", s.len()), pairs])?;
        parts.same_length([("ro", ro.len()), pairs])?;
        let pairs = y.into_iter().zip(s).zip(ro).map(|((y, s), ro)| Pair { y, s, ro }).collect();
        Ok(Self { pairs, h_diag, al })
    }
}
