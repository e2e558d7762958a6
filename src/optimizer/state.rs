//! An optimizer's state by value: out, and back in after every check.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

#[cfg(feature = "gpu")]
use super::Backend;
use super::Optimizer;
use crate::error::{Error, ErrorKind, Result, shape_text};
use crate::rule::ScalarSlots;
use crate::store::{Array, GroupState, ParamState, STATE_FORMAT, StateDict, StateValue};
use crate::tensor::Buffer;

/// Checked state of one parameter.
#[derive(Debug, Clone)]
struct Loaded<'s> {
    step: u64,
    /// In declaration order.
    slots: Vec<Option<Cow<'s, Array>>>,
    scalars: ScalarSlots,
}

impl Optimizer {
    /// A copy of everything but the parameters' values.
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
        Ok(StateDict {
            optimizer: Some(self.preset.name.to_owned()),
            format: STATE_FORMAT,
            update_count: self.update_count,
            skip_count: self.skip_count,
            unseen_end: self.unseen_end(),
            groups: groups.collect(),
            state,
        })
    }

    /// Replaces hyperparameters, steps and slots by those of `saved`, matched by name where both sides
    /// have names, else by position. Everything is checked before anything is written: class, groups,
    /// names, slots, shapes, dtypes and ranges.
    pub fn load_state_dict(&mut self, saved: &StateDict) -> Result<()> {
        let place = format!("{}.load_state_dict", self.preset.name);
        let refuse =
            |kind, name: &str, allowed: String, got: String| Err(Error::refuse(kind, &place, name, allowed, got));
        if let Some(class) = &saved.optimizer
            && class != self.preset.name
        {
            return refuse(ErrorKind::Value, "state", format!("of {}", self.preset.name), format!("of {class}"));
        }
        if saved.format != STATE_FORMAT {
            return refuse(ErrorKind::Value, "format version", STATE_FORMAT.to_string(), saved.format.to_string());
        }
        if saved.groups.len() != self.groups.len() {
            let (want, got) = (self.groups.len(), saved.groups.len());
            return refuse(ErrorKind::Value, "number of parameter groups", want.to_string(), got.to_string());
        }
        self.refuse_under_way(&place)?;
        match self.settle() {
            // Loading is what mends a loss, and takes the place of a step that was left out.
            Err(error) if matches!(error.kind(), ErrorKind::DeviceLost | ErrorKind::Nonfinite) => {}
            settled => settled?,
        }
        let mut groups = self.groups.clone();
        let mut all_sources = Vec::new();
        let mut loaded: Vec<Option<Loaded<'_>>> = vec![None; self.entries.len()];
        for (g, from) in saved.groups.iter().enumerate() {
            let changes: Vec<_> = from.hypers.iter().map(|(name, &value)| (name.as_str(), value)).collect();
            self.preset.set(&format!("{place}: group {g}"), &mut groups[g], &changes)?;
            for (i, source) in self.sources(g, from, &place)? {
                all_sources.push(source);
                if self.minimizer.is_some() {
                    continue;
                }
                if let Some(state) = saved.state.get(&source) {
                    if state.step == 0 && saved.optimizer.is_none() && self.preset.declaration().eager {
                        continue;
                    }
                    // Where the step means nothing it may be unknown, 0: what has state was updated.
                    loaded[i] = Some(self.check_state(i, state, &place)?);
                }
            }
        }
        let mut known = std::collections::BTreeSet::new();
        if let Some(twice) = saved.groups.iter().flat_map(|g| &g.params).find(|source| !known.insert(**source)) {
            return refuse(ErrorKind::Value, "indices of parameters", "different".into(), format!("{twice} twice"));
        }
        if let Some(stray) = saved.state.keys().find(|source| !known.contains(source)) {
            return refuse(ErrorKind::Value, "state", "of parameters in the groups".into(), format!("one for {stray}"));
        }
        #[cfg(feature = "gpu")]
        if let Backend::GpuVectors(space) = &mut self.backend {
            space.recover()?;
        }
        let minimizer = self.load_minimizer(&place, saved, &all_sources)?;
        self.write_state(&loaded)?;
        if minimizer.is_some() {
            let step = saved.state.values().next().map_or(0, |state| state.step.max(1));
            self.entries.iter_mut().for_each(|entry| entry.step = step);
            self.minimizer = minimizer;
        }
        self.groups = groups;
        self.update_count = saved.update_count;
        self.skip_count = saved.skip_count;
        self.torn = false;
        Ok(())
    }

    /// For each parameter of group `g`, the index it has in the saved state.
    fn sources(&self, g: usize, from: &GroupState, place: &str) -> Result<Vec<(usize, usize)>> {
        let members: Vec<usize> = (0..self.entries.len()).filter(|&i| self.entries[i].group == g).collect();
        let refuse =
            |name: String, allowed: String, got: String| Error::refuse(ErrorKind::Value, place, name, allowed, got);
        if from.params.len() != members.len() {
            let (want, got) = (members.len(), from.params.len());
            return Err(refuse(format!("number of parameters in group {g}"), want.to_string(), got.to_string()));
        }
        let names: Option<Vec<&str>> = members.iter().map(|&i| self.entries[i].info.name.as_deref()).collect();
        let (Some(ours), Some(theirs)) = (names, &from.param_names) else {
            return Ok(members.into_iter().zip(from.params.iter().copied()).collect());
        };
        if theirs.len() != from.params.len() {
            return Err(refuse(
                format!("param_names of group {g}"),
                from.params.len().to_string(),
                theirs.len().to_string(),
            ));
        }
        let by_name: BTreeMap<&str, usize> =
            theirs.iter().map(String::as_str).zip(from.params.iter().copied()).collect();
        members
            .into_iter()
            .zip(ours)
            .map(|(i, name)| match by_name.get(name) {
                Some(&source) => Ok((i, source)),
                None => {
                    let (want, got) = (format!("named {}", theirs.join(", ")), format!("one named {name}"));
                    Err(refuse(format!("parameters of group {g}"), want, got))
                }
            })
            .collect()
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
                half if half.of_state() == wanted => Cow::Owned(array.widened()),
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
