//! A line search for the strong Wolfe conditions along a direction d.
//!
//! With φ(t) = f(x + t·d) a step t is accepted where
//!
//! ```text
//! φ(t) ≤ φ(0) + c₁·t·φ'(0)        sufficient decrease
//! |φ'(t)| ≤ −c₂·φ'(0)             curvature
//! ```
//!
//! Nocedal, Wright: *Numerical optimization*, 2nd ed., Algorithms 3.5 (bracketing) and 3.6 (zoom), with the
//! bounded cubic interpolation of Schmidt's minFunc. Each decision is torch's: growing steps are cubic
//! within [t + 0.01·(t − t₋₁), 10·t]; a trial within a tenth of a bracket's end, the second time in a row
//! or outside, moves to a tenth; after `max_ls` refinements the better end counts.
//!
//! Deviation: a trial that is not finite is a failed decrease with an infinite loss, and the next trial
//! bisects the bracket; torch would go on to a step of NaN. So the result is always a finite trial, the
//! start (t = 0) if there is no better one.

/// What was found at a step length.
#[derive(Debug, Clone)]
pub struct Trial<V> {
    /// Step length.
    pub t: f64,
    /// φ(t), infinite where the trial was not finite.
    pub loss: f64,
    /// φ'(t) = ∇f(x + t·d)·d.
    pub slope: f64,
    /// ∇f(x + t·d), kept so that the accepted point need not be evaluated again.
    pub gradient: V,
    /// max|∂f/∂xᵢ|.
    pub steepest: f64,
}

impl<V> Trial<V> {
    /// Whether loss, slope and gradient are numbers.
    pub fn is_finite(&self) -> bool {
        self.loss.is_finite()
    }
}

/// What a search accepts, and when it gives up.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// c₁.
    pub decrease: f64,
    /// c₂.
    pub curvature: f64,
    /// Trials after the first.
    pub max_ls: u64,
    /// The largest change of an element that a bracket must still allow.
    pub min_change: f64,
}

/// A search under way.
#[derive(Debug, Clone)]
pub struct Search<V> {
    rules: Rules,
    start: Trial<V>,
    /// max|dᵢ|.
    d_max: f64,
    /// The step length asked for.
    t: f64,
    ls_iter: u64,
    /// While bracketing the previous trial, twice; then the bracket.
    ends: [Trial<V>; 2],
    zooming: bool,
    /// Which end has the lower loss.
    low: usize,
    /// Whether the last trial lay within a tenth of an end.
    was_close: bool,
}

impl<V: Clone> Search<V> {
    /// A search from `start` (t = 0, finite, with a negative slope) that asks for step `t` first.
    pub fn new(rules: Rules, start: Trial<V>, d_max: f64, t: f64) -> Self {
        let ends = [start.clone(), start.clone()];
        Self { rules, start, d_max, t, ls_iter: 0, ends, zooming: false, low: 0, was_close: false }
    }

    /// The step length to try.
    pub fn t(&self) -> f64 {
        self.t
    }

    /// Takes the trial at [`Search::t`]; the accepted trial, or none while there is another to make.
    pub fn tell(&mut self, new: Trial<V>) -> Option<Trial<V>> {
        if self.zooming { self.zoom(new) } else { self.bracket(new) }
    }

    fn decreases(&self, new: &Trial<V>) -> bool {
        new.loss <= self.start.loss + self.rules.decrease * new.t * self.start.slope
    }

    fn is_flat(&self, new: &Trial<V>) -> bool {
        new.slope.abs() <= -self.rules.curvature * self.start.slope
    }

    fn bracket(&mut self, new: Trial<V>) -> Option<Trial<V>> {
        let [previous, _] = &self.ends;
        if self.ls_iter >= self.rules.max_ls {
            let better = if self.start.loss <= new.loss { &self.start } else { &new };
            return Some(if new.is_finite() { better.clone() } else { previous.clone() });
        }
        let too_high = !self.decreases(&new) || (self.ls_iter > 1 && new.loss >= previous.loss);
        if !too_high && self.is_flat(&new) {
            return Some(new);
        }
        if too_high || new.slope >= 0.0 {
            self.zooming = true;
            self.ends[1] = new;
            self.order();
            return self.narrow();
        }
        self.t = interpolate(previous, &new, [new.t + 0.01 * (new.t - previous.t), 10.0 * new.t]);
        self.ls_iter += 1;
        self.ends[0] = new;
        None
    }

    fn zoom(&mut self, new: Trial<V>) -> Option<Trial<V>> {
        let (low, high) = (self.low, 1 - self.low);
        if !self.decreases(&new) || new.loss >= self.ends[low].loss {
            self.ends[high] = new;
            self.order();
            return self.narrow();
        }
        if self.is_flat(&new) {
            return Some(new);
        }
        if new.slope * (self.ends[high].t - self.ends[low].t) >= 0.0 {
            self.ends.swap(low, high);
        }
        self.ends[low] = new;
        self.narrow()
    }

    fn order(&mut self) {
        self.low = usize::from(self.ends[0].loss > self.ends[1].loss);
    }

    /// The next trial within the bracket, or its better end if it is narrow or the trials are spent.
    fn narrow(&mut self) -> Option<Trial<V>> {
        let [a, b] = &self.ends;
        let (left, right) = if a.t <= b.t { (a.t, b.t) } else { (b.t, a.t) };
        let width = right - left;
        if self.ls_iter >= self.rules.max_ls || width * self.d_max < self.rules.min_change {
            return Some(self.ends[self.low].clone());
        }
        let mut t = interpolate(a, b, [left, right]);
        let margin = 0.1 * width;
        let close = right - t < margin || t - left < margin;
        let push = close && (self.was_close || t >= right || t <= left);
        if push {
            t = if (t - right).abs() < (t - left).abs() { right - margin } else { left + margin };
        }
        self.was_close = close && !push;
        self.t = t;
        self.ls_iter += 1;
        None
    }
}

/// The minimum of the cubic through two trials and their slopes, kept within the bounds; the middle of
/// these where there is no such number.
fn interpolate<V>(a: &Trial<V>, b: &Trial<V>, [least, most]: [f64; 2]) -> f64 {
    let (a, b) = if a.t <= b.t { (a, b) } else { (b, a) };
    let d1 = a.slope + b.slope - 3.0 * (a.loss - b.loss) / (a.t - b.t);
    let square = d1 * d1 - a.slope * b.slope;
    let d2 = libm::sqrt(square);
    let t = b.t - (b.t - a.t) * ((b.slope + d2 - d1) / (b.slope - a.slope + 2.0 * d2));
    if square >= 0.0 && !t.is_nan() { t.max(least).min(most) } else { 0.5 * least + 0.5 * most }
}
