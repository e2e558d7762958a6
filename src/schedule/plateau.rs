//! Reduction when a metric stops improving.

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Smaller.
    Min,
    /// Larger.
    Max,
}

/// How the threshold counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThresholdMode {
    /// As a fraction of the best metric.
    Rel,
    /// As a difference.
    Abs,
}

/// When a metric counts as better, and how long to wait.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plateau {
    /// Which way is better.
    pub mode: Mode,
    /// How the threshold counts.
    pub threshold_mode: ThresholdMode,
    /// How much better a metric must be.
    pub threshold: f64,
    /// Epochs without improvement before a reduction.
    pub patience: i64,
    /// Epochs after a reduction in which nothing is counted.
    pub cooldown: i64,
}

/// What a plateau remembers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Memory {
    /// The best metric so far.
    pub best: f64,
    /// Epochs since it.
    pub bad_epochs: i64,
    /// Epochs of cooldown left.
    pub cooldown_left: i64,
}

impl Plateau {
    /// Whether `metric` beats `best`. NaN never does.
    pub fn is_better(&self, metric: f64, best: f64) -> bool {
        match (self.mode, self.threshold_mode) {
            (Mode::Min, ThresholdMode::Rel) => metric < best * (1.0 - self.threshold),
            (Mode::Min, ThresholdMode::Abs) => metric < best - self.threshold,
            (Mode::Max, ThresholdMode::Rel) => metric > best * (self.threshold + 1.0),
            (Mode::Max, ThresholdMode::Abs) => metric > best + self.threshold,
        }
    }

    /// The memory after a metric, and whether to reduce now.
    pub fn observe(&self, memory: Memory, metric: f64) -> (Memory, bool) {
        let mut next = memory;
        if self.is_better(metric, memory.best) {
            next.best = metric;
            next.bad_epochs = 0;
        } else {
            next.bad_epochs += 1;
        }
        if next.cooldown_left > 0 {
            next.cooldown_left -= 1;
            next.bad_epochs = 0;
        }
        let reduce = next.bad_epochs > self.patience;
        if reduce {
            next.cooldown_left = self.cooldown;
            next.bad_epochs = 0;
        }
        (next, reduce)
    }
}

/// The reduced value: not below `floor`, and unchanged where the change would be at most `eps`.
pub fn reduced(current: f64, factor: f64, floor: f64, eps: f64) -> f64 {
    let next = if current * factor > floor { current * factor } else { floor };
    if current - next > eps { next } else { current }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_reduces_and_cools_down() {
        let plateau =
            Plateau { mode: Mode::Min, threshold_mode: ThresholdMode::Rel, threshold: 1e-4, patience: 1, cooldown: 2 };
        let mut memory = Memory { best: f64::INFINITY, bad_epochs: 0, cooldown_left: 0 };
        let mut reductions = Vec::new();
        for epoch in 0..12 {
            let (next, reduce) = plateau.observe(memory, if epoch == 0 { 1.0 } else { f64::NAN });
            memory = next;
            if reduce {
                reductions.push(epoch);
            }
        }
        assert_eq!(reductions, [2, 6, 10]);
        assert_eq!(reduced(1e-9, 0.1, 0.0, 1e-8), 1e-9);
        assert_eq!(reduced(0.1, 0.1, 0.05, 1e-8), 0.05);
    }
}
