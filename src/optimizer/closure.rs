//! Optimizers whose step evaluates the loss several times: all parameters as one vector, one state.
//!
//! ```text
//! begin   params → x, kept aside; the method asks for an evaluation at x
//! tell    loss, gradients → the method; its next point → params      until it is done
//! abandon x → params; the state is as before the step
//! ```

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::Range;

#[cfg(feature = "gpu")]
use super::Backend;
use super::Optimizer;
use crate::closure::descent::{Descent, Limits, Settings, State};
use crate::closure::parts::{Part, Parts};
use crate::closure::vector::{HostHome, HostVector, Vector};
use crate::closure::{Ask, ClosureRule, Machine};
use crate::cpu::StandardFloats;
use crate::cpu::memory::{gather, spread};
use crate::drill::point;
use crate::error::{Error, ErrorKind, Result};
#[cfg(feature = "gpu")]
use crate::gpu;
use crate::hyper::Hypers;
use crate::real::{Dtype, Real};
use crate::room;
use crate::rules::{ClosureRuleId, ClosureVisitor, Method};
use crate::store::{Array, StateDict, StateValue};
use crate::tensor::{TensorMut, TensorRef};

/// A closure method over the parameters of an optimizer.
pub(super) trait Minimizer: Debug + Send {
    /// Whether a step is under way.
    fn is_running(&self) -> bool;

    /// Begins a step at the parameters' values.
    fn begin(&mut self, h: &Hypers, params: &[TensorMut<'_>]) -> Result<()>;

    /// Answers with loss and gradients at the parameters' values, and brings the parameters to the next
    /// point, or to the end of the step. Where a device or memory fails, the step ends as if it had not begun.
    fn tell(&mut self, loss: f64, params: &mut [TensorMut<'_>], gradients: &[Option<TensorRef<'_>>]) -> Result<Ask>;

    /// Ends a step under way as if it had not begun; the parameters get their values back, if they are given.
    fn abandon(&mut self, params: Option<&mut [TensorMut<'_>]>);

    /// Names of the state's values.
    fn names(&self, h: &Hypers) -> Vec<&'static str>;

    /// The values that are wanted, by name.
    fn state(&self, h: &Hypers, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<(&'static str, StateValue)>>;

    /// Evaluations and iterations in all steps.
    fn counts(&self) -> [u64; 2];

    /// A mark of the last step's end, if that was never evaluated.
    fn unseen_end(&self) -> Option<u64>;

    /// Takes a saved state whose vectors have the parts of this one's in this order; on an error nothing changes.
    fn load(
        &mut self,
        place: &str,
        values: &BTreeMap<String, StateValue>,
        order: &[Range<usize>],
        unseen_end: Option<u64>,
    ) -> Result<()>;
}

/// The minimizer of a method that knows nothing yet of its function, after so many evaluations and iterations.
fn new<V: Vector + 'static>(rule: ClosureRuleId, home: V::Home, n: usize, counts: [u64; 2]) -> Box<dyn Minimizer> {
    struct New<V: Vector>(V::Home, usize, [u64; 2]);

    impl<V: Vector + 'static> ClosureVisitor for New<V> {
        type Out = Box<dyn Minimizer>;

        fn visit<R: ClosureRule>(self) -> Self::Out {
            Box::new(Flat::<V, R>::new(self.0, self.1, self.2))
        }
    }
    rule.with_rule(New::<V>(home, n, counts))
}

/// What messages call vectors of all parameters.
const WHAT: &str = "a vector of all parameters";

/// All parameters as one vector.
#[derive(Debug)]
struct Flat<V: Vector, R: ClosureRule> {
    home: V::Home,
    machine: Descent<V, R::Memory<V>>,
    /// Numbers of all parameters.
    n: usize,
    /// The step under way.
    under_way: Option<UnderWay<V, R>>,
    gradient: Vec<V::Real>,
}

/// What an optimizer knows of a step beside the machine.
#[derive(Debug)]
struct UnderWay<V: Vector, R: ClosureRule> {
    settings: Settings<R::Options>,
    limits: Limits,
    /// Where it began.
    start: Vec<V::Real>,
    /// By parameter, once the first gradients are known: whether it has none, and so is left alone.
    rests: Option<Vec<bool>>,
    /// The machine before, for its state.
    before: Descent<V, R::Memory<V>>,
}

impl<V: Vector, R: ClosureRule> Flat<V, R> {
    fn new(home: V::Home, n: usize, [func_evals, n_iter]: [u64; 2]) -> Self {
        let state = State { func_evals, n_iter, ..State::default() };
        Self { home, machine: state.into(), n, under_way: None, gradient: Vec::new() }
    }

    /// The state of the last step that was done.
    fn lasting(&self) -> &State<V, R::Memory<V>> {
        self.under_way.as_ref().map_or(&self.machine, |under_way| &under_way.before).state()
    }

    /// Leaves the parameters in these parts of the vector out of the step, whatever their values are. Where they
    /// moved before, what was learned of the function is no longer true, and goes.
    fn let_rest(&mut self, parts: &[Range<usize>]) -> Result<()> {
        let Some(under_way) = &self.under_way else { return Ok(()) };
        let resting: usize = parts.iter().map(Range::len).sum();
        if resting == 0 {
            return Ok(());
        }
        let state = self.machine.state();
        let moved = |part: &Part<V>| parts.iter().any(|range| !is_zero(part, range));
        // Where all rest the step ends at once.
        if resting < self.n && state.parts(&under_way.settings.method).iter().any(|(_, part)| moved(part)) {
            let counts = State { func_evals: state.func_evals, n_iter: state.n_iter, ..State::default() };
            self.machine = counts.into();
        }
        let mut x = room::copied(&under_way.start, WHAT)?;
        parts.iter().for_each(|range| x[range.clone()].fill(V::Real::ZERO));
        let x = V::new(&self.home, &x)?;
        self.machine.begin_within(&under_way.settings, x, under_way.limits.clone())
    }

    /// Puts the gradients together; the machine's answer and, where it did not fail, its next point in the
    /// parameters.
    fn answer(&mut self, loss: f64, params: &mut [TensorMut<'_>], gradients: &[Option<TensorRef<'_>>]) -> Result<Ask> {
        if self.under_way.as_ref().is_some_and(|under_way| under_way.rests.is_none()) {
            let mut parts = Vec::new();
            each_part(params.iter().zip(gradients).map(|(p, g)| (p.raw.len, g)), |part, g| {
                parts.extend(g.is_none().then_some(part));
            });
            self.let_rest(&parts)?;
            if let Some(under_way) = &mut self.under_way {
                under_way.rests = Some(gradients.iter().map(Option::is_none).collect());
            }
        }
        let rests = self.under_way.as_ref().and_then(|under_way| under_way.rests.as_deref()).unwrap_or(&[]);
        // A gradient that is missing later in the step, or of a parameter that rests, is one of zeros.
        self.gradient.clear();
        self.gradient.resize(self.n, V::Real::ZERO);
        let parts = params.iter().zip(gradients).zip(rests).map(|((p, g), rests)| (p.raw.len, (g, rests)));
        each_part(parts, |part, (g, rests)| {
            if let (Some(g), false) = (g, rests) {
                gather(g, &mut self.gradient[part]);
            }
        });
        let ask = self.machine.tell(loss, V::new(&self.home, &self.gradient)?);
        V::outcome(&self.home)?;
        spread_all(&self.machine.point().to_host()?, params, rests);
        Ok(ask)
    }
}

/// Whether the vectors in a value are zero in a part.
fn is_zero<V: Vector>(part: &Part<V>, range: &Range<usize>) -> bool {
    match part {
        Part::Vector(x) => x.largest_of(range.clone()) == 0.0,
        Part::List(items) => items.iter().all(|item| is_zero(item, range)),
        _ => true,
    }
}

/// Hands each tensor its part of a flat vector.
fn each_part<T>(tensors: impl IntoIterator<Item = (usize, T)>, mut visit: impl FnMut(Range<usize>, T)) {
    let mut start = 0;
    for (len, tensor) in tensors {
        point();
        visit(start..start + len, tensor);
        start += len;
    }
}

/// Writes all parameters to one vector.
fn gather_all<F: Real>(params: &[TensorMut<'_>], x: &mut [F]) {
    each_part(params.iter().map(|p| (p.raw.len, p)), |part, p| gather(&p.reading(), &mut x[part]));
}

fn spread_all<F: Real>(x: &[F], params: &mut [TensorMut<'_>], rests: &[bool]) {
    let parts = params.iter_mut().enumerate().map(|(i, p)| (p.raw.len, (i, p)));
    each_part(parts, |part, (i, p)| {
        if !rests.get(i).is_some_and(|&rests| rests) {
            spread(&x[part], p);
        }
    });
}

impl<V: Vector, R: ClosureRule> Minimizer for Flat<V, R> {
    fn is_running(&self) -> bool {
        self.under_way.is_some()
    }

    fn begin(&mut self, h: &Hypers, params: &[TensorMut<'_>]) -> Result<()> {
        let mut start = room::filled(self.n, V::Real::ZERO, WHAT)?;
        gather_all(params, &mut start);
        room::reserve(&mut self.gradient, self.n, WHAT)?;
        let settings = Settings::of(h, R::options(h));
        let narrow = params.iter().any(|p| p.raw.dtype != V::Real::DTYPE);
        let mut limits = Vec::new();
        if narrow {
            each_part(params.iter().map(|p| (p.raw.len, p.raw.dtype)), |part, dtype| {
                limits.push((part.end, dtype.largest()));
            });
        }
        let limits = Limits::from(limits);
        let before = self.machine.clone();
        self.machine.begin_within(&settings, V::new(&self.home, &start)?, limits.clone())?;
        self.under_way = Some(UnderWay { settings, limits, start, rests: None, before });
        Ok(())
    }

    fn tell(&mut self, loss: f64, params: &mut [TensorMut<'_>], gradients: &[Option<TensorRef<'_>>]) -> Result<Ask> {
        let answer = self.answer(loss, params, gradients);
        match answer {
            Ok(Ask::Evaluate) => {}
            Ok(Ask::Done) => {
                // The gradient is used up.
                gather_all(params, &mut self.gradient);
                self.machine.ended_at(&self.gradient);
                self.under_way = None;
            }
            Err(_) => {
                // The error is told; others of the same step are over with it.
                let _ = V::outcome(&self.home);
                self.abandon(Some(params));
            }
        }
        answer
    }

    fn abandon(&mut self, params: Option<&mut [TensorMut<'_>]>) {
        let Some(under_way) = self.under_way.take() else { return };
        self.machine = under_way.before;
        if let Some(params) = params {
            spread_all(&under_way.start, params, &[]);
        }
    }

    fn names(&self, h: &Hypers) -> Vec<&'static str> {
        self.lasting().parts(&R::options(h)).into_iter().map(|(name, _)| name).collect()
    }

    fn state(&self, h: &Hypers, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<(&'static str, StateValue)>> {
        let parts = self.lasting().parts(&R::options(h));
        let wanted = parts.into_iter().filter(|(name, _)| wanted(name));
        wanted.map(|(name, part)| Ok((name, shown(part)?))).collect()
    }

    fn counts(&self) -> [u64; 2] {
        let state = self.lasting();
        [state.func_evals, state.n_iter]
    }

    fn unseen_end(&self) -> Option<u64> {
        self.lasting().unseen_end()
    }

    fn load(
        &mut self,
        place: &str,
        values: &BTreeMap<String, StateValue>,
        order: &[Range<usize>],
        unseen_end: Option<u64>,
    ) -> Result<()> {
        let read =
            |(name, value): (&String, &StateValue)| Ok((name.clone(), part(&self.home, place, name, value, order)?));
        let parts = values.iter().map(read).collect::<Result<_>>()?;
        self.machine = State::from_parts(Parts::new(place, self.n, parts))?.with_unseen_end(unseen_end).into();
        Ok(())
    }
}

fn shown<V: Vector>(part: Part<V>) -> Result<StateValue> {
    Ok(match part {
        Part::None => StateValue::None,
        Part::Count(n) => StateValue::Count(n),
        Part::Number(x) => StateValue::Number(x),
        Part::Vector(x) => {
            let numbers: Vec<f64> = room::listed(x.to_host()?.iter().map(|x| x.to_f64()), WHAT)?;
            StateValue::Array(Array::from_numbers(V::Real::DTYPE, vec![numbers.len()], &numbers)?)
        }
        Part::List(items) => StateValue::List(items.into_iter().map(shown).collect::<Result<_>>()?),
    })
}

/// A saved value as the method takes it: an array of one number without axes as the number (torch keeps such),
/// a vector in the order of this optimizer's parameters.
fn part<V: Vector>(
    home: &V::Home,
    place: &str,
    name: &str,
    value: &StateValue,
    order: &[Range<usize>],
) -> Result<Part<V>> {
    Ok(match value {
        StateValue::None => Part::None,
        StateValue::Count(n) => Part::Count(*n),
        StateValue::Number(x) => Part::Number(*x),
        StateValue::Array(array) if array.shape.is_empty() => {
            Part::Number(array.numbers()?.first().copied().unwrap_or(0.0))
        }
        StateValue::Array(array) if array.dtype.of_state() == V::Real::DTYPE => {
            let numbers = array.numbers()?;
            // A vector of another length is refused by those who know its name.
            let fits = order.iter().map(Range::len).sum::<usize>() == numbers.len();
            let mut moved = Vec::new();
            room::reserve(&mut moved, numbers.len(), WHAT)?;
            if fits {
                order
                    .iter()
                    .for_each(|range| moved.extend(numbers[range.clone()].iter().map(|&x| V::Real::from_f64(x))));
            } else {
                moved.extend(numbers.iter().map(|&x| V::Real::from_f64(x)));
            }
            Part::Vector(V::new(home, &moved)?)
        }
        StateValue::Array(array) => {
            return Err(Error::refuse(ErrorKind::Type, place, name, V::Real::DTYPE, array.dtype));
        }
        StateValue::List(items) => {
            let items = items.iter().enumerate();
            let read = items.map(|(i, item)| part(home, place, &format!("{name}[{i}]"), item, order));
            Part::List(read.collect::<Result<_>>()?)
        }
    })
}

/// Whether a device was lost, and the state on it.
fn is_lost<T>(outcome: &Result<T>) -> bool {
    matches!(outcome, Err(e) if e.kind() == ErrorKind::DeviceLost)
}

impl Optimizer {
    pub(super) fn refuse_under_way(&self, place: &str) -> Result<()> {
        match &self.minimizer {
            Some(minimizer) if minimizer.is_running() => {
                Err(Error::plain(ErrorKind::Concurrent, format!("{place}: a step of this optimizer is under way"))
                    .with_remedy("call it before or after the step, not from its closure"))
            }
            _ => Ok(()),
        }
    }

    fn minimizer(&mut self, place: &str) -> Result<&mut Box<dyn Minimizer>> {
        self.minimizer.as_mut().ok_or_else(|| {
            Error::refuse(ErrorKind::Type, place, "gradients", "given", "a closure that is called several times")
        })
    }

    /// The one set of hyperparameters of an optimizer whose groups share one vector.
    fn joint_hypers(&self, place: &str) -> Result<&Hypers> {
        let [first, others @ ..] = &self.groups[..] else { unreachable!("it has a group: it has parameters") };
        for (g, group) in others.iter().enumerate() {
            Self::refuse_other_hypers(&format!("{place}: group {}", g + 1), first, group)?;
        }
        Ok(first)
    }

    pub(super) fn refuse_other_hypers(place: &str, first: &Hypers, group: &Hypers) -> Result<()> {
        match first.iter().zip(group.iter()).find(|(a, b)| a != b) {
            None => Ok(()),
            Some(((name, want), (_, got))) => {
                let allowed = format!("{want} as in the first group");
                let remedy = "all parameters are one vector here: set it in every group";
                Err(Error::refuse(ErrorKind::Value, place, name, allowed, got).with_remedy(remedy))
            }
        }
    }

    /// The minimizer of an optimizer of this kind for the parameters it has now; the counts of the one it had
    /// stay if `keep_counts`.
    fn minimizer_for_parameters(&self, keep_counts: bool) -> Option<Box<dyn Minimizer>> {
        let Method::Closure(rule) = self.preset.method else { return None };
        let n = self.entries.iter().map(|entry| entry.info.reals()).sum();
        let wide = self.entries.iter().any(|entry| entry.info.dtype.part() == Dtype::F64);
        let counts = self.minimizer.as_ref().filter(|_| keep_counts).map_or([0, 0], |minimizer| minimizer.counts());
        Some(match &self.backend {
            #[cfg(feature = "gpu")]
            Backend::GpuVectors(space) => new::<gpu::DeviceVector>(rule, space.home(), n, counts),
            _ if wide => new::<HostVector<f64>>(rule, HostHome::default(), n, counts),
            _ => new::<HostVector<f32>>(rule, HostHome::default(), n, counts),
        })
    }

    /// Takes in parameters that were added: what was learned of the function of the others goes.
    pub(super) fn resize_minimizer(&mut self) {
        self.minimizer = self.minimizer_for_parameters(true);
    }

    /// Forgets the state of all parameters.
    pub(super) fn reset_minimizer(&mut self) {
        self.minimizer = self.minimizer_for_parameters(false);
    }

    /// Begins a step of an optimizer that evaluates the loss several times. Evaluate at the values that the
    /// parameters have, and [`Optimizer::tell`].
    ///
    /// ```
    /// use roptim::closure::Ask;
    /// use roptim::hyper::Choice;
    /// use roptim::{Dtype, Optimizer, Options, ParamInfo, Value};
    ///
    /// let mut w = vec![3.0f64, -4.0];
    /// let mut lbfgs = Optimizer::cpu("LBFGS", &Options::default())?;
    /// let search = ("line_search_fn", Value::Choice(Choice::StrongWolfe));
    /// lbfgs.add_group(&[search], vec![ParamInfo::vector("w", 2, Dtype::F64)])?;
    /// for _ in 0..5 {
    ///     lbfgs.begin(&mut [w.as_mut_slice().into()])?;
    ///     let mut ask = Ask::Evaluate;
    ///     while ask == Ask::Evaluate {
    ///         let (loss, gradient) = (w[0] * w[0] + 5.0 * w[1] * w[1], [2.0 * w[0], 10.0 * w[1]]);
    ///         ask = lbfgs.tell(loss, &mut [w.as_mut_slice().into()], &[Some(gradient.as_slice().into())])?;
    ///     }
    /// }
    /// assert!(w.iter().all(|w| w.abs() < 1e-3));
    /// # Ok::<(), roptim::Error>(())
    /// ```
    pub fn begin(&mut self, params: &mut [TensorMut<'_>]) -> Result<()> {
        let _arithmetic = StandardFloats::begin();
        let place = self.place_of("step").to_string();
        self.minimizer(&place)?;
        self.refuse_under_way(&place)?;
        self.check(params, &vec![None; params.len()])?;
        let hypers = self.joint_hypers(&place)?.clone();
        self.torn = true;
        let begun = self.minimizer(&place)?.begin(&hypers, params);
        self.torn = is_lost(&begun);
        begun
    }

    /// Takes loss and gradients at the parameters' values and brings the parameters to where the method asks
    /// for the next evaluation, or where its step ended. A parameter whose first gradient in the step is `None` is
    /// left alone in it; where it moved before, the method forgets what it learned of the function. On an error
    /// of what was given the step is still under way: call again, or [`Optimizer::abandon`]. On one of a device
    /// it has ended as if it had not begun.
    pub fn tell(
        &mut self,
        loss: f64,
        params: &mut [TensorMut<'_>],
        gradients: &[Option<TensorRef<'_>>],
    ) -> Result<Ask> {
        let _arithmetic = StandardFloats::begin();
        let place = self.place_of("step").to_string();
        if !self.minimizer(&place)?.is_running() {
            return Err(Error::refuse(ErrorKind::Value, place, "step", "under way", "an answer without a question"));
        }
        self.check(params, gradients)?;
        self.torn = true;
        let n = self.entries.iter().map(|entry| entry.info.reals()).sum::<usize>();
        let (minimizer, pool) = (self.minimizer.as_mut(), self.backend.pool(n));
        let Some(minimizer) = minimizer else { unreachable!("it is running") };
        let ask = match pool {
            Some(pool) => pool.install(|| minimizer.tell(loss, params, gradients)),
            None => minimizer.tell(loss, params, gradients),
        };
        self.torn = is_lost(&ask);
        let ask = ask?;
        if ask == Ask::Done {
            self.entries.iter_mut().for_each(|entry| entry.step = entry.step.saturating_add(1));
            self.update_count = self.update_count.saturating_add(1);
        }
        Ok(ask)
    }

    /// Ends a step under way as if it had not begun: parameters and state are as before it. Without one nothing
    /// happens. Without the parameters, where they cannot be reached, the optimizer is torn.
    pub fn abandon(&mut self, params: Option<&mut [TensorMut<'_>]>) -> Result<()> {
        if !self.minimizer.as_ref().is_some_and(|minimizer| minimizer.is_running()) {
            return Ok(());
        }
        let place = self.place_of("step").to_string();
        let torn = std::mem::replace(&mut self.torn, false);
        let fitting = params.map(|params| self.check(params, &vec![None; params.len()]).map(|()| params));
        self.torn = true;
        let minimizer = self.minimizer(&place)?;
        match fitting {
            Some(Ok(params)) => {
                minimizer.abandon(Some(params));
                self.torn = torn;
                Ok(())
            }
            Some(Err(error)) => {
                minimizer.abandon(None);
                Err(error)
            }
            None => {
                minimizer.abandon(None);
                Ok(())
            }
        }
    }

    /// The minimizer that has a state to show, and the hyperparameters.
    fn seasoned(&self) -> Option<(&dyn Minimizer, &Hypers)> {
        let minimizer = self.minimizer.as_deref().filter(|minimizer| minimizer.counts()[0] > 0);
        minimizer.zip(self.groups.first())
    }

    /// Names of the state that all parameters share, shown at the first one.
    pub(super) fn joint_names(&self, index: usize) -> Vec<&'static str> {
        self.seasoned().filter(|_| index == 0).map_or(Vec::new(), |(minimizer, hypers)| minimizer.names(hypers))
    }

    /// All of it.
    pub(super) fn joint_state(&self, index: usize) -> Result<Vec<(&'static str, StateValue)>> {
        // Vectors are shown in the parameters' types.
        let _arithmetic = StandardFloats::begin();
        let seasoned = self.seasoned().filter(|_| index == 0);
        seasoned.map_or(Ok(Vec::new()), |(minimizer, hypers)| minimizer.state(hypers, &|_| true))
    }

    /// A mark of the last step's end, if the method never evaluated there.
    pub(super) fn unseen_end(&self) -> Option<u64> {
        self.minimizer.as_ref()?.unseen_end()
    }

    /// A copy of one value of it.
    pub fn joint_value(&self, index: usize, key: &str) -> Result<Option<StateValue>> {
        let _arithmetic = StandardFloats::begin();
        let Some((minimizer, hypers)) = self.seasoned().filter(|_| index == 0) else { return Ok(None) };
        Ok(minimizer.state(hypers, &|name| name == key)?.pop().map(|(_, value)| value))
    }

    /// The minimizer in the state that `saved` has for its first parameter; `sources` are the indices that this
    /// optimizer's parameters have there.
    pub(super) fn load_minimizer(
        &self,
        place: &str,
        saved: &StateDict,
        sources: &[usize],
    ) -> Result<Option<Box<dyn Minimizer>>> {
        let _arithmetic = StandardFloats::begin();
        let Some(mut minimizer) = self.minimizer_for_parameters(false) else { return Ok(None) };
        let order: Vec<usize> = saved.groups.iter().flat_map(|group| group.params.iter().copied()).collect();
        if let Some(stray) = saved.state.keys().find(|&key| Some(key) != order.first()) {
            let got = format!("one of parameter {stray}");
            return Err(Error::refuse(ErrorKind::Value, place, "state", "of the first parameter alone", got));
        }
        let Some(state) = saved.state.values().next() else { return Ok(Some(minimizer)) };
        let sizes: BTreeMap<usize, usize> =
            sources.iter().zip(&self.entries).map(|(&source, entry)| (source, entry.info.reals())).collect();
        let mut ranges = BTreeMap::new();
        each_part(order.iter().map(|source| (sizes.get(source).copied().unwrap_or(0), source)), |range, source| {
            ranges.insert(source, range);
        });
        let order: Vec<Range<usize>> = sources.iter().filter_map(|source| ranges.get(source).cloned()).collect();
        minimizer.load(&format!("{place}: state"), &state.slots, &order, saved.unseen_end)?;
        Ok(Some(minimizer))
    }
}

#[cfg(all(test, feature = "gpu"))]
mod tests {
    use super::*;
    use crate::store::ParamInfo;
    use crate::{Options, hyper::Value};

    #[test]
    fn a_device_that_is_lost_in_a_step_leaves_all_as_it_was() {
        for (name, evaluations) in [("LBFGS", 1), ("LBFGS", 4), ("ConjugateGradient", 3)] {
            let request = gpu::DeviceRequest { allow_software: true, alone: true, ..gpu::DeviceRequest::default() };
            let mut optimizer = match Optimizer::gpu(name, &Options::default(), &request) {
                Err(e) if e.kind() == ErrorKind::NoAdapter => {
                    assert!(std::env::var("ROPTIM_REQUIRE_GPU").as_deref() != Ok("1"), "{e}");
                    return;
                }
                opened => opened.unwrap(),
            };
            let hypers = [("max_iter", Value::Int(4)), ("lr", Value::Float(0.01))];
            optimizer.add_group(&hypers, vec![ParamInfo::vector("w", 2, Dtype::F32)]).unwrap();
            let mut w = [3.0f32, -4.0];
            let answer = |w: [f32; 2]| (f64::from(w[0] * w[0] + 5.0 * w[1] * w[1]), [2.0 * w[0], 10.0 * w[1]]);
            let tell = |optimizer: &mut Optimizer, w: &mut [f32; 2]| {
                let (loss, g) = answer(*w);
                optimizer.tell(loss, &mut [w.as_mut_slice().into()], &[Some(g.as_slice().into())])
            };
            optimizer.begin(&mut [w.as_mut_slice().into()]).unwrap();
            while tell(&mut optimizer, &mut w).unwrap() == Ask::Evaluate {}
            let saved = optimizer.state_dict().unwrap();
            let (before, counts) = (w, optimizer.minimizer.as_ref().unwrap().counts());
            optimizer.begin(&mut [w.as_mut_slice().into()]).unwrap();
            for _ in 1..evaluations {
                assert_eq!(tell(&mut optimizer, &mut w).unwrap(), Ask::Evaluate);
            }
            optimizer.force_loss();
            let error = tell(&mut optimizer, &mut w).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::DeviceLost, "{evaluations}: {error}");
            assert!(optimizer.is_torn() && w == before);
            let minimizer = optimizer.minimizer.as_ref().unwrap();
            assert!(!minimizer.is_running() && minimizer.counts() == counts);
            optimizer.abandon(Some(&mut [w.as_mut_slice().into()])).unwrap();
            assert_eq!(optimizer.begin(&mut [w.as_mut_slice().into()]).unwrap_err().kind(), ErrorKind::Torn);
            let error = optimizer.state_dict().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::DeviceLost, "{error}");
            optimizer.load_state_dict(&saved).unwrap();
            optimizer.begin(&mut [w.as_mut_slice().into()]).unwrap();
            while tell(&mut optimizer, &mut w).unwrap() == Ask::Evaluate {}
            assert!(w != before);
        }
    }
}
