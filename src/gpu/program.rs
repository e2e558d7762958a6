//! The passes of a tensor rule: tables of tensors, working memory, dispatches.
//!
//! Each pass is one dispatch for all tensors of a window; the shader finds the tensor that a workgroup or a lane
//! belongs to. Where working memory for all of them would exceed one binding, they go in batches that share it.

use super::arena::{Arena, Role, Window};
use super::context::Context;
use super::passes::{Dispatch, table_buffer};
use crate::error::Result;
use crate::real::Dtype;
use crate::rule::{Area, Form, MAX_AREAS, MAX_SLOTS, MAX_UNITS, Program};
use crate::rules::TensorRuleId;
use crate::shader::{self, TENSOR_WORDS};

/// One tensor of a table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Member {
    /// First element in the window.
    pub(super) at: usize,
    /// First element in the bound gradients.
    pub(super) gradient_at: usize,
    /// Which coefficient row.
    pub(super) row: usize,
    /// First element of each slot.
    pub(super) slots: [usize; MAX_SLOTS],
    pub(super) form: Form,
    /// How often its passes that repeat run.
    pub(super) turns: u32,
}

/// Working memory that lasts for one step.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    buffers: Vec<wgpu::Buffer>,
}

impl Scratch {
    /// Makes it at least so long, in words; whether it had to grow. On an error nothing has changed.
    pub(super) fn ensure(
        &mut self,
        context: &Context,
        place: &str,
        areas: &[Area],
        words: [usize; MAX_AREAS],
    ) -> Result<bool> {
        let wanted: Vec<u64> = words.iter().take(areas.len()).map(|&n| 4 * n.max(4) as u64).collect();
        if self.buffers.len() == wanted.len() && self.buffers.iter().zip(&wanted).all(|(b, &n)| b.size() >= n) {
            return Ok(false);
        }
        context.refuse_beyond_memory(place, wanted.iter().sum())?;
        self.buffers = context.scoped(place, || {
            let make =
                |(area, &bytes): (&Area, _)| context.buffer(area.name, bytes, wgpu::BufferUsages::STORAGE, false);
            Ok(areas.iter().zip(&wanted).map(make).collect())
        })?;
        Ok(true)
    }

    /// Bytes on the device.
    pub(super) fn bytes(&self) -> u64 {
        self.buffers.iter().map(wgpu::Buffer::size).sum()
    }
}

/// Words that a tensor needs in each area.
pub(super) fn words(program: &Program, form: &Form) -> [usize; MAX_AREAS] {
    std::array::from_fn(|k| match program.areas.get(k) {
        Some(area) if form.len > 0 => (area.words)(form),
        _ => 0,
    })
}

/// Cuts tensors into runs that need at most so many words in each area together; a tensor that exceeds them alone
/// is a run of its own.
pub(super) fn batches<'a>(program: &Program, members: &'a [Member], most: usize) -> Vec<&'a [Member]> {
    let (mut found, mut start, mut taken) = (Vec::new(), 0, [0; MAX_AREAS]);
    for (i, member) in members.iter().enumerate() {
        let needed = words(program, &member.form);
        if i > start && taken.iter().zip(needed).any(|(&taken, needed)| taken + needed > most) {
            found.push(&members[start..i]);
            (start, taken) = (i, [0; MAX_AREAS]);
        }
        taken.iter_mut().zip(needed).for_each(|(taken, needed)| *taken += needed);
    }
    found.push(&members[start..]);
    found
}

/// The words of the table's entries, and how many units of each kind there are.
fn entries(program: &Program, members: &[Member]) -> (Vec<u32>, [usize; MAX_UNITS]) {
    let (mut all, mut first, mut taken) = (Vec::new(), [0; MAX_UNITS], [0; MAX_AREAS]);
    // What one binding may span has fewer than 2³² words.
    let mut push = |words: &[usize]| all.extend(words.iter().map(|&word| word as u32));
    for Member { at, gradient_at, row, slots, form, .. } in members {
        push(&[at / 4, gradient_at / 4, form.len, *row, form.matrices, form.rows, form.columns, 0]);
        push(slots);
        push(&taken);
        push(&first);
        first.iter_mut().zip(program.units).for_each(|(first, unit)| *first += (unit.count)(form));
        taken.iter_mut().zip(words(program, form)).for_each(|(taken, words)| *taken += words);
    }
    // The last entry is no tensor: it says where the units end.
    push(&[0; TENSOR_WORDS - MAX_UNITS]);
    push(&first);
    (all, first)
}

/// What the passes over the tensors of one window work on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bound<'a> {
    pub(super) window: Window,
    /// Gradients and what they store.
    pub(super) gradients: &'a wgpu::Buffer,
    pub(super) gradient: Dtype,
    /// Control words and coefficient rows.
    pub(super) work: &'a wgpu::Buffer,
}

/// The passes over some tensors of one window, which need no more working memory than there is.
pub(super) fn dispatches(
    context: &Context,
    place: &str,
    rule: TensorRuleId,
    (arena, scratch): (&Arena, &Scratch),
    bound: Bound<'_>,
    members: &[Member],
) -> Result<Vec<Dispatch>> {
    let (program, stem) = (rule.program(), rule.declaration().stem);
    let Bound { window, gradients, gradient, work } = bound;
    let slots = (0..rule.declaration().slots.len()).map(|k| arena.buffer(place, Role::Slot(k), window));
    let slots = slots.collect::<Result<Vec<_>>>()?;
    let parameters = arena.buffer(place, Role::Parameter, window)?;
    let (entries, totals) = entries(program, members);
    let chunk = members.first().map_or(0, |member| member.form.chunk);
    let table = |turn: u32| {
        let head = [members.len() as u32, chunk as u32, turn, 0];
        table_buffer(context, place, "tensors", head.iter().chain(&entries))
    };
    let mut made = Vec::new();
    for passes in program.passes.chunk_by(|a, b| a.repeats == b.repeats) {
        let repeats = passes.first().is_some_and(|pass| pass.repeats);
        let turns = if repeats { members.iter().map(|member| member.turns).max().unwrap_or(0) } else { 1 };
        for turn in 0..turns {
            let table = context.scoped(place, || table(turn))?;
            for pass in passes {
                let unit = &program.units[pass.unit];
                let name = format!("{stem}.{} {} {gradient}", pass.entry, window.parameter);
                let make = || shader::tensors(rule, pass, window.parameter, gradient);
                let pipeline = context.pipeline(place, &name, make)?;
                let lanes = if unit.by_lane { context.workgroup() as usize } else { 1 };
                let workgroups = totals[pass.unit].div_ceil(lanes) as u32;
                if workgroups == 0 {
                    continue;
                }
                let mut buffers = vec![parameters, gradients, &table, work];
                buffers.extend(slots.iter().copied().chain(&scratch.buffers));
                let dispatch =
                    context.scoped(place, || Ok(Dispatch::new(context, &name, pipeline, &buffers, workgroups)))?;
                made.push(dispatch);
            }
        }
    }
    Ok(made)
}
