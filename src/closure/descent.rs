//! One optimizer step of a method that goes downhill along directions, and what outlives it.
//!
//! ```text
//! evaluate at x; stop if max|g| ≤ tolerance_grad
//! repeat up to max_iter times:
//!     d, t ← the method's direction and first trial step
//!     stop if g·d > −tolerance_change
//!     x ← x + t·d, t by line search or as it is; g ← ∇f(x)
//!     stop if evaluations ≥ max_eval, max|g| ≤ tolerance_grad, max|t·d| ≤ tolerance_change,
//!             or |f − f₋₁| < tolerance_change
//! ```
//!
//! This is the loop of torch's LBFGS, for conjugate gradients too. Deviations, all for numbers that are
//! not finite or steps that cannot move:
//!
//! - A first evaluation that is not finite ends the step where it began; only `func_evals` counts it. But where the
//!   step began at the last one's end, and that was never evaluated (without line search the last iteration moves
//!   and stops), the method first goes back along its last direction, to a tenth of the last move, a hundredth and
//!   so on, within `max_eval`.
//! - A point that a parameter's narrower type cannot hold ([`Limits`]) counts as one that is not finite.
//! - A direction without a finite slope is replaced by −g, and the method's memory is emptied.
//! - Without line search, a point that is not finite is taken back and a tenth of the step tried, within
//!   `max_eval`. The last iteration moves without evaluating, as torch does, so its loss is unknown.
//! - A line search with a first step of 0 (lr = 0) makes no trials.
//! - Its smallest bracket is torch's fixed 1e-9, or `tolerance_change` where that is larger.
//! - Scalars are f64 where torch has them in the parameters' type.

use std::fmt::Debug;
use std::mem;
use std::sync::Arc;

use super::parts::{Part, Parts};
use super::vector::{Reduction, Vector};
use super::wolfe::{Rules, Search, Trial};
use super::{Ask, Machine};
use crate::error::{Error, ErrorKind, Result};
use crate::hyper::Hypers;
use crate::real::Real;

/// c₁ of the line search.
const DECREASE: f64 = 1e-4;
/// torch's smallest change of an element within a bracket.
const MIN_CHANGE: f64 = 1e-9;

/// What a step may cost and when it ends; defaults as torch's LBFGS.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings<O> {
    /// The first trial step of a method that has no better guess.
    pub lr: f64,
    /// Iterations in one step.
    pub max_iter: u64,
    /// Evaluations after which no further iteration begins. A line search may make one more, so a step
    /// evaluates at most `max_eval` + 1 times; torch counts so.
    pub max_eval: u64,
    /// Largest |gᵢ| that counts as a minimum.
    pub tolerance_grad: f64,
    /// Smallest change of the loss or of an element that counts as progress.
    pub tolerance_change: f64,
    /// The method's own.
    pub method: O,
}

impl<O> Settings<O> {
    /// A group's hyperparameters, with the method's own choices in them.
    pub fn of(h: &Hypers, method: O) -> Self {
        let count = |name| h.whole(name).map(|n| n.max(0).unsigned_abs());
        let max_iter = count("max_iter").unwrap_or(u64::MAX);
        Self {
            lr: h.float("lr"),
            max_iter,
            max_eval: count("max_eval").unwrap_or_else(|| default_max_eval(max_iter)),
            tolerance_grad: h.float("tolerance_grad"),
            tolerance_change: h.float("tolerance_change"),
            method,
        }
    }
}

/// Evaluations for so many iterations where nobody says how many.
pub fn default_max_eval(max_iter: u64) -> u64 {
    max_iter.saturating_mul(5) / 4
}

impl<O: Default> Default for Settings<O> {
    fn default() -> Self {
        let method = O::default();
        Self { lr: 1.0, max_iter: 20, max_eval: 25, tolerance_grad: 1e-7, tolerance_change: 1e-9, method }
    }
}

/// The last iteration's start and move.
#[derive(Debug, Clone, PartialEq)]
pub struct Last<V> {
    /// Direction.
    pub d: V,
    /// Step length along it.
    pub t: f64,
    /// Gradient where the iteration began.
    pub prev_flat_grad: V,
    /// Loss where the iteration began.
    pub prev_loss: f64,
}

/// What a point must stay within, where parts of it are stored in a narrower type: the largest magnitude of the
/// elements up to an index, part by part.
pub type Limits = Arc<[(usize, f64)]>;

/// What outlives a step. Vectors are shared, so a clone is cheap.
#[derive(Debug, Clone, PartialEq)]
pub struct State<V, M> {
    /// Evaluations in all steps.
    pub(crate) func_evals: u64,
    /// Iterations in all steps.
    pub(crate) n_iter: u64,
    /// None before the first iteration.
    pub(crate) last: Option<Last<V>>,
    /// The method's own.
    pub(crate) memory: M,
    /// A mark of the last step's end, if that was never evaluated.
    pub(crate) unseen_end: Option<u64>,
}

/// A number that tells points apart. Of one that cannot be read, which an error tells of, it does not matter.
fn fingerprint_of<V: Vector>(x: &V) -> u64 {
    x.to_host().map_or(0, |x| fingerprint(&x))
}

fn fingerprint<F: Real>(x: &[F]) -> u64 {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    x.iter().for_each(|x| hash.update(&x.to_f64().to_bits().to_le_bytes()));
    hash.digest()
}

impl<V, M: Default> Default for State<V, M> {
    fn default() -> Self {
        Self { func_evals: 0, n_iter: 0, last: None, memory: M::default(), unseen_end: None }
    }
}

impl<V: Vector, M: Method<V>> State<V, M> {
    /// A mark of the last step's end, if that was never evaluated.
    pub fn unseen_end(&self) -> Option<u64> {
        self.unseen_end
    }

    /// With such a mark.
    #[must_use]
    pub fn with_unseen_end(self, unseen_end: Option<u64>) -> Self {
        Self { unseen_end, ..self }
    }

    /// As named values, under torch's names; but for [`State::unseen_end`], which torch does not keep.
    pub fn parts(&self, options: &M::Options) -> Vec<(&'static str, Part<V>)> {
        let mut parts = vec![("func_evals", Part::Count(self.func_evals)), ("n_iter", Part::Count(self.n_iter))];
        if let Some(last) = &self.last {
            parts.extend([
                ("d", Part::Vector(last.d.clone())),
                ("t", Part::Number(last.t)),
                ("prev_flat_grad", Part::Vector(last.prev_flat_grad.clone())),
                ("prev_loss", Part::Number(last.prev_loss)),
            ]);
            parts.extend(self.memory.parts(options));
        }
        parts
    }

    /// From such values; refuses what does not fit.
    pub fn from_parts(mut parts: Parts<V>) -> Result<Self> {
        let (func_evals, n_iter) = (parts.count("func_evals")?, parts.count("n_iter")?);
        let mut state = Self { func_evals, n_iter, ..Self::default() };
        if parts.has("d") {
            state.last = Some(Last {
                d: parts.vector("d")?,
                t: parts.number("t")?,
                prev_flat_grad: parts.vector("prev_flat_grad")?,
                prev_loss: parts.number("prev_loss")?,
            });
            state.memory = M::from_parts(&mut parts)?;
        }
        parts.finish()?;
        Ok(state)
    }

    fn check(&self, n: usize) -> Result<()> {
        match &self.last {
            Some(last) if last.d.len() != n => {
                let (want, got) = (format!("of {} elements", last.d.len()), n);
                Err(Error::refuse(ErrorKind::Value, M::NAME, "the point", want, got))
            }
            _ => Ok(()),
        }
    }
}

/// What sets one method apart: its memory, and how this turns gradients into directions.
///
/// The default memory is the empty one. The first iteration of all goes along −g without asking.
pub trait Method<V: Vector>: Clone + Debug + Default {
    /// What a user chooses.
    type Options: Clone + Debug;
    /// For messages.
    const NAME: &'static str;
    /// c₂ of the line search.
    const CURVATURE: f64;

    /// Whether steps are searched for.
    fn searches(options: &Self::Options) -> bool;

    /// The direction at a point with gradient `g`, after the move `last`.
    fn direction(&mut self, options: &Self::Options, last: &Last<V>, g: &V) -> V;

    /// The first step to try along a direction with this slope; none for the one of the first iteration.
    fn trial_step(lr: f64, last: &Last<V>, slope: f64) -> Option<f64>;

    /// The memory as named values.
    fn parts(&self, options: &Self::Options) -> Vec<(&'static str, Part<V>)>;

    /// From such values.
    fn from_parts(parts: &mut Parts<V>) -> Result<Self>;
}

/// A method that asks for evaluations, one step after another.
///
/// The state changes only when a step is done: a step that is abandoned leaves it as it was. A clone between steps
/// is cheap.
#[derive(Debug, Clone)]
pub struct Descent<V: Vector, M: Method<V>> {
    state: Arc<State<V, M>>,
    run: Option<Run<V, M>>,
    end: V,
    first_loss: f64,
}

impl<V: Vector, M: Method<V>> Default for Descent<V, M> {
    fn default() -> Self {
        State::default().into()
    }
}

impl<V: Vector, M: Method<V>> From<State<V, M>> for Descent<V, M> {
    fn from(state: State<V, M>) -> Self {
        Self { state: Arc::new(state), run: None, end: V::default(), first_loss: f64::NAN }
    }
}

impl<V: Vector, M: Method<V>> Descent<V, M> {
    /// As of the last step that was done.
    pub fn state(&self) -> &State<V, M> {
        &self.state
    }

    /// Ends a step under way as if it had not begun.
    pub fn abandon(&mut self) {
        self.run = None;
    }

    /// Says where the last step really ended, if that was never evaluated: rounding to a narrower type moves a point.
    pub fn ended_at(&mut self, x: &[V::Real]) {
        if self.state.unseen_end.is_some() {
            Arc::make_mut(&mut self.state).unseen_end = Some(fingerprint(x));
        }
    }

    /// Begins a step at `x` and asks for an evaluation there; abandons a step under way.
    pub fn begin(&mut self, settings: &Settings<M::Options>, x: impl Into<V>) -> Result<()> {
        self.begin_within(settings, x, Limits::default())
    }

    /// [`Descent::begin`], with limits of the points.
    pub fn begin_within(&mut self, settings: &Settings<M::Options>, x: impl Into<V>, limits: Limits) -> Result<()> {
        let x = x.into();
        self.state.check(x.len())?;
        let begins_unseen = self.state.unseen_end.is_some_and(|end| end == fingerprint_of(&x));
        self.first_loss = f64::NAN;
        let nowhere = Trial { t: 0.0, loss: f64::NAN, slope: f64::NAN, gradient: V::default(), steepest: f64::NAN };
        self.run = Some(Run {
            settings: settings.clone(),
            limits,
            begins_unseen,
            state: State { unseen_end: None, ..(*self.state).clone() },
            x: x.clone(),
            point: x,
            here: nowhere,
            d: V::default(),
            d_max: 0.0,
            evals: 0,
            iterations: 0,
            phase: Phase::Start,
        });
        Ok(())
    }
}

impl<V: Vector, M: Method<V>> Machine<V> for Descent<V, M> {
    fn tell(&mut self, loss: f64, gradient: impl Into<V>) -> Ask {
        let Some(run) = &mut self.run else { return Ask::Done };
        if run.evals == 0 {
            self.first_loss = loss;
        }
        let ask = run.tell(loss, gradient.into());
        if ask == Ask::Done
            && let Some(run) = self.run.take()
        {
            (self.state, self.end) = (Arc::new(run.state), run.x);
        }
        ask
    }

    fn point(&self) -> &V {
        self.run.as_ref().map_or(&self.end, |run| &run.point)
    }

    fn first_loss(&self) -> f64 {
        self.first_loss
    }
}

/// What the evaluation asked for is.
#[derive(Debug, Clone)]
enum Phase<V> {
    Start,
    /// So much of the last step's move, where all of it led nowhere.
    Back {
        t: f64,
    },
    Search(Search<V>),
    Fixed {
        t: f64,
    },
}

/// A step under way.
#[derive(Debug, Clone)]
struct Run<V: Vector, M: Method<V>> {
    settings: Settings<M::Options>,
    limits: Limits,
    /// Whether it began at an end that was never evaluated.
    begins_unseen: bool,
    state: State<V, M>,
    /// Where the iteration began.
    x: V,
    /// Where to evaluate.
    point: V,
    /// What was found at `x`.
    here: Trial<V>,
    d: V,
    /// max|dᵢ|.
    d_max: f64,
    evals: u64,
    iterations: u64,
    phase: Phase<V>,
}

impl<V: Vector, M: Method<V>> Run<V, M> {
    fn tell(&mut self, loss: f64, gradient: V) -> Ask {
        self.evals += 1;
        self.state.func_evals = self.state.func_evals.saturating_add(1);
        match mem::replace(&mut self.phase, Phase::Start) {
            Phase::Start => {
                self.here = self.trial(0.0, loss, gradient);
                match &self.state.last {
                    _ if self.here.is_finite() => self.set_out(),
                    Some(last) if self.begins_unseen => self.go_back(0.1 * last.t),
                    _ => Ask::Done,
                }
            }
            Phase::Back { t } => {
                self.here = self.trial(0.0, loss, gradient);
                if !self.here.is_finite() {
                    return self.go_back(0.1 * t);
                }
                mem::swap(&mut self.x, &mut self.point);
                if let Some(last) = &mut self.state.last {
                    last.t = t;
                }
                self.set_out()
            }
            Phase::Search(mut search) => {
                let new = self.trial(search.t(), loss, gradient);
                match search.tell(new) {
                    Some(found) => self.arrive(found),
                    None => self.ask(search.t(), Phase::Search(search)),
                }
            }
            Phase::Fixed { t } => {
                let new = self.trial(t, loss, gradient);
                let shorter = 0.1 * t;
                if new.is_finite() {
                    self.arrive(new)
                } else if self.evals < self.settings.max_eval && shorter * self.d_max > self.settings.tolerance_change {
                    self.ask(shorter, Phase::Fixed { t: shorter })
                } else {
                    self.arrive(self.here.clone())
                }
            }
        }
    }

    fn trial(&self, t: f64, loss: f64, gradient: V) -> Trial<V> {
        let [slope, steepest, farthest] =
            V::reduce([Reduction::Dot(&gradient, &self.d), gradient.whole(), self.point.whole()]);
        let is_finite = gradient.len() == self.x.len()
            && [loss, slope, steepest, farthest].iter().all(|x| x.is_finite())
            && self.is_within_limits(&self.point);
        let loss = if is_finite { loss } else { f64::INFINITY };
        let slope = if is_finite { slope } else { f64::NAN };
        Trial { t, loss, slope, gradient, steepest }
    }

    /// Whether the parameters' types can hold a finite point.
    fn is_within_limits(&self, point: &V) -> bool {
        let mut start = 0;
        let within = |&(end, limit): &(usize, f64)| point.largest_of(mem::replace(&mut start, end)..end) <= limit;
        self.limits.iter().all(within)
    }

    fn set_out(&mut self) -> Ask {
        if self.is_flat() { Ask::Done } else { self.iterate() }
    }

    /// Asks for an evaluation after `t` of the last move.
    fn go_back(&mut self, t: f64) -> Ask {
        let Some(last) = &self.state.last else { return Ask::Done };
        let moves = t * last.d.largest() > self.settings.tolerance_change;
        if !moves || self.evals >= self.settings.max_eval {
            // It ends where it began, which nobody has seen yet.
            self.state.unseen_end = Some(fingerprint_of(&self.x));
            return Ask::Done;
        }
        let surplus = last.t - t;
        self.point.set_to_sum(&self.x, -surplus, &last.d);
        self.phase = Phase::Back { t };
        Ask::Evaluate
    }

    fn is_flat(&self) -> bool {
        self.here.steepest <= self.settings.tolerance_grad
    }

    fn iterate(&mut self) -> Ask {
        let Self { settings, state, here, .. } = self;
        if self.iterations >= settings.max_iter {
            return Ask::Done;
        }
        self.iterations += 1;
        state.n_iter = state.n_iter.saturating_add(1);
        let g = &here.gradient;
        let mut d = match &state.last {
            Some(last) => state.memory.direction(&settings.method, last, g),
            None => g.negative(),
        };
        let measure = |d: &V| V::reduce([Reduction::Dot(g, d), d.whole()]);
        let [mut slope, mut d_max] = measure(&d);
        if !slope.is_finite() {
            state.memory = M::default();
            d = g.negative();
            [slope, d_max] = measure(&d);
        }
        let t = state.last.as_ref().and_then(|last| M::trial_step(settings.lr, last, slope));
        let t = t.unwrap_or_else(|| (1.0 / g.sum_abs()).min(1.0) * settings.lr);
        state.last = Some(Last { d: d.clone(), t, prev_flat_grad: g.clone(), prev_loss: here.loss });
        (here.t, here.slope) = (0.0, slope);
        (self.d_max, self.d) = (d_max, d);
        if !slope.is_finite() || slope > -settings.tolerance_change {
            return Ask::Done;
        }
        if !M::searches(&settings.method) {
            if self.iterations < settings.max_iter {
                return self.ask(t, Phase::Fixed { t });
            }
            self.place(t);
            if self.point.largest().is_finite() && self.is_within_limits(&self.point) {
                mem::swap(&mut self.x, &mut self.point);
                self.state.unseen_end = Some(fingerprint_of(&self.x));
            } else if let Some(last) = &mut self.state.last {
                last.t = 0.0;
            }
            return Ask::Done;
        }
        if !(t > 0.0 && t.is_finite()) {
            return Ask::Done;
        }
        let rules = Rules {
            decrease: DECREASE,
            curvature: M::CURVATURE,
            max_ls: settings.max_eval.saturating_sub(self.evals),
            min_change: MIN_CHANGE.max(settings.tolerance_change),
        };
        let search = Search::new(rules, here.clone(), self.d_max, t);
        self.ask(t, Phase::Search(search))
    }

    fn place(&mut self, t: f64) {
        self.point.set_to_sum(&self.x, t, &self.d);
    }

    fn ask(&mut self, t: f64, phase: Phase<V>) -> Ask {
        self.place(t);
        self.phase = phase;
        Ask::Evaluate
    }

    /// Ends the iteration at a finite trial; t = 0 stays.
    fn arrive(&mut self, found: Trial<V>) -> Ask {
        let t = found.t;
        if t != 0.0 {
            self.x.add_scaled(t, &self.d);
        }
        if let Some(last) = &mut self.state.last {
            last.t = t;
        }
        let before = mem::replace(&mut self.here, found).loss;
        let Settings { max_iter, max_eval, tolerance_change, .. } = self.settings;
        let is_done = self.iterations >= max_iter
            || self.evals >= max_eval
            || self.is_flat()
            || t * self.d_max <= tolerance_change
            || (self.here.loss - before).abs() < tolerance_change;
        if is_done { Ask::Done } else { self.iterate() }
    }
}
