//! An optimizer's state by value: out, and back in after every check.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::matching::{HyperChange, LoadOptions, LoadReport, Matching, Members, matched};

#[cfg(feature = "gpu")]
use super::Backend;
use super::Optimizer;
use crate::error::{Error, ErrorKind, Result, shape_text};
use crate::hyper::Hypers;
use crate::rule::ScalarSlots;
use crate::store::{Array, GroupState, ParamFacts, ParamState, STATE_FORMAT, StateDict, StateValue};
use crate::tensor::Buffer;

/// Checked state of one parameter.
#[derive(Debug, Clone)]
struct Loaded<'s> {
    step: u64,
    /// In declaration order.
    slots: Vec<Option<Cow<'s, Array>>>,
    scalars: ScalarSlots,
}

/// A load that passed every check and has changed nothing yet.
struct Planned<'s> {
    groups: Vec<Hypers>,
    states: Vec<Option<Loaded<'s>>>,
    /// For each parameter, its index in the saved state.
    sources: Vec<usize>,
    report: LoadReport,
}

impl Optimizer {
    /// A copy of everything but the parameters' values. Refused after a step that was interrupted half-way.
    pub fn state_dict(&mut self) -> Result<StateDict> {
        self.settle()?;
        let declared = self.preset.declaration().slots;
        let known: Vec<usize> = (0..self.entries.len()).filter(|&i| self.has_state(i)).collect();
        let wanted: Vec<_> = known.iter().flat_map(|&i| (0..declared.len()).map(move |k| (i, k))).collect();
        let mut arrays = self.read_slots(&wanted)?.into_iter();
        let mut state = BTreeMap::new();
        for i in known {
            let entry = &self.entries[i];
            let present = declared.iter().zip(arrays.by_ref()).filter_map(|(s, array)| Some((s.name, array?)));
            let present = present.map(|(key, array)| (key.to_owned(), StateValue::Array(array)));
            let numbers = self.preset.declaration().scalars.iter().zip(entry.scalars);
            let numbers = numbers.map(|(s, value)| (s.name.to_owned(), StateValue::Number(value)));
            let joint = self.joint_state(i)?.into_iter().map(|(name, value)| (name.to_owned(), value));
            state.insert(i, ParamState { step: entry.step, slots: present.chain(numbers).chain(joint).collect() });
        }
        let groups = self.groups.iter().enumerate().map(|(g, hypers)| {
            let members = || self.entries.iter().enumerate().filter(move |(_, e)| e.group == g);
            GroupState {
                hypers: hypers.iter().map(|(name, value)| (name.to_owned(), value)).collect(),
                params: members().map(|(i, _)| i).collect(),
                param_names: members().map(|(_, e)| e.info.name.clone()).collect(),
            }
        });
        // A device that was lost has said so above.
        self.refuse_torn("state_dict")?;
        Ok(StateDict {
            optimizer: Some(self.preset.name.to_owned()),
            format: STATE_FORMAT,
            update_count: self.update_count,
            skip_count: self.skip_count,
            unseen_end: self.unseen_end(),
            groups: groups.collect(),
            parameters: self.entries.iter().map(|entry| ParamFacts::of(&entry.info)).enumerate().collect(),
            state,
        })
    }

    /// Replaces hyperparameters, steps and slots by those of `saved`, and refuses every difference.
    pub fn load_state_dict(&mut self, saved: &StateDict) -> Result<LoadReport> {
        self.load_state_dict_with(saved, &LoadOptions::default())
    }

    /// Replaces hyperparameters, steps and slots by those of `saved`. Parameters are matched by name where both
    /// sides have names, else by position; groups by what is in them. Everything is checked before anything is
    /// written: class, groups, names, slots, shapes, dtypes and ranges. Shapes and dtypes must fit whatever the
    /// options say.
    pub fn load_state_dict_with(&mut self, saved: &StateDict, options: &LoadOptions) -> Result<LoadReport> {
        let place = self.loading_place();
        let Planned { groups, states, sources, report } = self.plan_load(&place, saved, options)?;
        #[cfg(feature = "gpu")]
        if let Backend::GpuVectors(space) = &mut self.backend {
            space.recover()?;
        }
        let minimizer = self.load_minimizer(&place, saved, &sources)?;
        self.write_state(&states)?;
        if minimizer.is_some() {
            let step = saved.state.values().next().map_or(0, |state| state.step.max(1));
            self.entries.iter_mut().for_each(|entry| entry.step = step);
            self.minimizer = minimizer;
        }
        *self.groups.change() = groups;
        self.update_count = saved.update_count;
        self.skip_count = saved.skip_count;
        self.torn = false;
        // They are of another run than the state that was loaded, or half of what was added.
        self.clear_sums();
        Ok(report)
    }

    /// What [`load_state_dict_with`](Optimizer::load_state_dict_with) would do, with all its checks.
    pub fn check_load(&mut self, saved: &StateDict, options: &LoadOptions) -> Result<LoadReport> {
        let place = self.loading_place();
        let Planned { sources, report, .. } = self.plan_load(&place, saved, options)?;
        #[cfg(feature = "gpu")]
        if matches!(self.backend, Backend::GpuVectors(_)) {
            // Its check makes vectors on the device, which may have to be opened anew first.
            return Ok(report);
        }
        self.load_minimizer(&place, saved, &sources)?;
        Ok(report)
    }

    fn loading_place(&self) -> String {
        format!("{}.load_state_dict", self.preset.name)
    }

    fn plan_load<'s>(&mut self, place: &str, saved: &'s StateDict, options: &LoadOptions) -> Result<Planned<'s>> {
        let refuse =
            |kind, name: &str, allowed: String, got: String| Err(Error::refuse(kind, place, name, allowed, got));
        let conversion = match saved.optimizer.as_deref() {
            Some(class) if class != self.preset.name => match self.preset.takes.iter().find(|c| c.from == class) {
                None => {
                    let classes: Vec<_> =
                        std::iter::once(self.preset.name).chain(self.preset.takes.iter().map(|c| c.from)).collect();
                    return refuse(
                        ErrorKind::Value,
                        "state",
                        format!("of {}", classes.join(" or ")),
                        format!("of {class}"),
                    );
                }
                known => known,
            },
            _ => None,
        };
        if saved.format != STATE_FORMAT {
            return refuse(ErrorKind::Value, "format version", STATE_FORMAT.to_string(), saved.format.to_string());
        }
        self.refuse_under_way(place)?;
        match self.settle() {
            // Loading is what mends a loss, and takes the place of a step that was left out.
            Err(error) if matches!(error.kind(), ErrorKind::DeviceLost | ErrorKind::Nonfinite) => {}
            settled => settled?,
        }
        let ours: Vec<Members> = (0..self.groups.len()).map(|g| self.members(g)).collect();
        let theirs =
            saved.groups.iter().map(|group| Members { params: group.params.clone(), names: group.param_names.clone() });
        let Matching { sources, initialised, dropped, groups: origins } =
            matched(place, &ours, &theirs.collect::<Vec<_>>(), options)?;
        if self.minimizer.is_some() && (!initialised.is_empty() || !dropped.is_empty()) {
            let got = format!("{} new and {} left out", initialised.len(), dropped.len());
            return refuse(ErrorKind::Value, "parameters", "all those of the saved state, which share it".into(), got);
        }
        let mut groups = self.groups.to_vec();
        for (g, hypers) in groups.iter_mut().enumerate() {
            let place = format!("{place}: group {g}");
            if let (false, Some(origin)) = (options.keep_hypers, origins[g]) {
                let kept = |name: &str| conversion.is_some_and(|c| c.keeps.contains(&name));
                let all = saved.groups[origin].hypers.iter().filter(|(name, _)| !kept(name));
                self.preset.set(
                    &place,
                    hypers,
                    &all.map(|(name, &value)| (name.as_str(), value)).collect::<Vec<_>>(),
                )?;
            }
            let given: Vec<_> = options.hypers.iter().map(|(name, value)| (name.as_str(), *value)).collect();
            self.preset.set(&place, hypers, &given)?;
        }
        let mut states: Vec<Option<Loaded<'_>>> = vec![None; self.entries.len()];
        for (&i, source) in &sources {
            if let Some(facts) = saved.parameters.get(source) {
                self.check_facts(i, facts, place)?;
            }
            let Some(state) = saved.state.get(source).filter(|_| self.minimizer.is_none()) else { continue };
            if state.step == 0 && saved.optimizer.is_none() && self.preset.declaration().eager {
                continue;
            }
            // Where the step means nothing it may be unknown, 0: what has state was updated.
            states[i] = Some(self.check_state(i, state, place)?);
        }
        let known: BTreeSet<usize> = saved.groups.iter().flat_map(|group| &group.params).copied().collect();
        if let Some(stray) = saved.state.keys().chain(saved.parameters.keys()).find(|i| !known.contains(i)) {
            return refuse(ErrorKind::Value, "state", "of parameters in the groups".into(), format!("one for {stray}"));
        }
        let changes = self.groups.iter().zip(&groups).enumerate().flat_map(|(group, (old, new))| {
            let pairs = old.iter().zip(new.iter()).filter(|((_, old), (_, new))| old != new);
            pairs.map(move |((name, old), (_, new))| HyperChange { group, name, old, new })
        });
        let report = LoadReport {
            loaded: sources.keys().copied().collect(),
            initialised,
            dropped,
            groups: origins,
            changed: changes.collect(),
            converted_from: conversion.map(|c| c.from.to_owned()),
            kept: conversion.map_or(Vec::new(), |c| c.keeps.to_vec()),
        };
        // In the order of the parameters.
        Ok(Planned { groups, states, sources: sources.into_values().collect(), report })
    }

    /// The parameters of a group, as a load matches them.
    fn members(&self, group: usize) -> Members {
        let entries = || self.entries.iter().enumerate().filter(move |(_, entry)| entry.group == group);
        Members {
            params: entries().map(|(i, _)| i).collect(),
            names: entries().map(|(_, entry)| entry.info.name.clone()).collect(),
        }
    }

    fn check_facts(&self, i: usize, saved: &ParamFacts, place: &str) -> Result<()> {
        let info = &self.entries[i].info;
        let refuse = |kind, what: &str, allowed: String, got: String| {
            let name = format!("{what} of {} in the saved state", info.label(i));
            Err(Error::refuse(kind, place, name, allowed, got))
        };
        if saved.shape != info.shape {
            return refuse(ErrorKind::Value, "shape", shape_text(&info.shape), shape_text(&saved.shape));
        }
        if saved.dtype != info.dtype {
            return refuse(ErrorKind::Type, "dtype", info.dtype.to_string(), saved.dtype.to_string());
        }
        Ok(())
    }

    fn check_state<'s>(&self, i: usize, state: &'s ParamState, place: &str) -> Result<Loaded<'s>> {
        let info = &self.entries[i].info;
        let declared = self.preset.declaration();
        let refuse = |kind, key: &str, allowed: String, got: String| {
            Err(Error::refuse(kind, place, format!("{key} of {}", info.label(i)), allowed, got))
        };
        let mut loaded = Loaded {
            step: state.step.max(1),
            slots: vec![None; declared.slots.len()],
            scalars: self.preset.first_scalars(),
        };
        for (key, value) in &state.slots {
            if let Some(k) = declared.scalars.iter().position(|s| s.name == key) {
                match value.number() {
                    Some(x) if x.is_finite() => loaded.scalars[k] = x,
                    Some(x) => return refuse(ErrorKind::Value, key, "a finite number".into(), x.to_string()),
                    None => return refuse(ErrorKind::Type, key, "a number".into(), value.kind().into()),
                }
                continue;
            }
            let slot = declared.slots.iter().position(|s| s.name == key);
            let Some((k, shape)) = slot.and_then(|k| Some((k, self.preset.slot_shape(k, &info.shape)?))) else {
                let known = (0..declared.slots.len()).filter(|&k| self.preset.slot_shape(k, &info.shape).is_some());
                let known: Vec<_> =
                    known.map(|k| declared.slots[k].name).chain(declared.scalars.iter().map(|s| s.name)).collect();
                let allowed =
                    if known.is_empty() { "absent".to_owned() } else { format!("one of {}", known.join(", ")) };
                return refuse(ErrorKind::Value, "state key", allowed, key.clone());
            };
            let Some(array) = value.array() else {
                return refuse(ErrorKind::Type, key, "an array".into(), value.kind().into());
            };
            if array.shape != shape {
                return refuse(
                    ErrorKind::Value,
                    key,
                    format!("of shape {}", shape_text(&shape)),
                    shape_text(&array.shape),
                );
            }
            let wanted = info.dtype.of_state();
            loaded.slots[k] = Some(match array.dtype {
                same if same == wanted => Cow::Borrowed(array),
                // torch keeps the state of half-precision parameters in half precision.
                half if half.of_state() == wanted => Cow::Owned(array.widened()?),
                other => return refuse(ErrorKind::Type, key, wanted.to_string(), other.to_string()),
            });
        }
        // What every variant of the rule uses must be there; the rest starts at zero when it is needed.
        let certain = self.preset.certain_slots(&info.shape);
        let missing = certain.iter().find(|&k| loaded.slots[k].is_none()).map(|k| declared.slots[k].name);
        let number = declared.scalars.iter().find(|s| !state.slots.contains_key(s.name)).map(|s| s.name);
        if let Some(key) = missing.or(number) {
            return refuse(ErrorKind::Value, key, "present".into(), "none".into());
        }
        if declared.shows_step && state.step == 0 {
            return refuse(ErrorKind::Value, "step", "present and >= 1".into(), "none or 0".into());
        }
        Ok(loaded)
    }

    /// Writes checked state. New buffers are allocated first, so that running out of memory changes
    /// nothing; views of old buffers keep what they show.
    fn write_state(&mut self, loaded: &[Option<Loaded<'_>>]) -> Result<()> {
        #[cfg(feature = "gpu")]
        if let Backend::Gpu(executor) = &mut self.backend {
            let declared = self.preset.declaration().slots.len();
            let mut slots: Vec<Vec<Option<&[u8]>>> = vec![vec![None; declared]; loaded.len()];
            for (slots, state) in slots.iter_mut().zip(loaded).filter_map(|(s, state)| Some((s, state.as_ref()?))) {
                *slots = state.slots.iter().map(|array| Some(array.as_ref()?.bytes.as_slice())).collect();
            }
            let outcome = executor.replace_slots(&slots);
            self.torn |= matches!(&outcome, Err(e) if e.kind() == ErrorKind::DeviceLost);
            outcome?;
            self.write_numbers(loaded);
            return Ok(());
        }
        let mut fresh = Vec::with_capacity(loaded.len());
        for state in loaded {
            let mut slots = vec![None; self.preset.declaration().slots.len()];
            for (slot, array) in slots.iter_mut().zip(state.iter().flat_map(|state| &state.slots)) {
                if let Some(array) = array {
                    let buffer = Buffer::zeroed(array.len() * array.dtype.parts(), array.dtype.part())?;
                    buffer.copy_from(&array.bytes);
                    *slot = Some(Arc::new(buffer));
                }
            }
            fresh.push(slots);
        }
        self.allocations += 1;
        for (entry, slots) in self.entries.iter_mut().zip(fresh) {
            entry.slots = slots;
        }
        self.write_numbers(loaded);
        Ok(())
    }

    fn write_numbers(&mut self, loaded: &[Option<Loaded<'_>>]) {
        for (entry, state) in self.entries.iter_mut().zip(loaded) {
            entry.step = state.as_ref().map_or(0, |state| state.step);
            entry.scalars = state.as_ref().map_or(self.preset.first_scalars(), |state| state.scalars);
        }
    }
}
