//! An optimizer's state as a tree in torch's layout, and back.

use std::collections::BTreeMap;

use super::path::Path;
use super::tree::{DataType, Key, TensorData, Tree};
use crate::error::{Error, ErrorKind, Result};
use crate::hyper::{Choice, Hyper, Value};
use crate::store::{Array, GroupState, ParamFacts, ParamState, STATE_FORMAT, StateDict, StateValue};

/// Starts every message.
const PLACE: &str = "state_dict";

impl StateDict {
    /// As a tree in the layout of torch's `state_dict()`:
    ///
    /// ```text
    /// {"state": {0: {"step": 5, "exp_avg": array, …}, …},
    ///  "param_groups": [{"lr": 0.001, …, "params": [0, 1], "param_names": ["W", "b"]}],
    ///  "roptim": {"optimizer": "Adam", "format": 1, "update_count": 5, "skip_count": 0,
    ///             "parameters": {0: {"shape": (3, 2), "dtype": "float32"}, …}}}
    /// ```
    ///
    /// `shows_step` is what the optimizer's rule declares. Where torch keeps no `step` (SGD), the steps go
    /// to `roptim.steps`, by parameter index.
    pub fn into_tree(self, shows_step: bool) -> Tree {
        let steps = self.state.iter().map(|(&i, state)| (index_key(i), state.step.into())).collect();
        let state = self.state.into_iter().map(|(i, state)| {
            let step = shows_step.then(|| (Key::from("step"), Tree::from(state.step)));
            let slots = state.slots.into_iter().map(|(key, value)| (Key::Str(key), value.into()));
            (index_key(i), Tree::Dict(step.into_iter().chain(slots).collect()))
        });
        let state = Tree::Dict(state.collect());
        let groups = Tree::List(self.groups.into_iter().map(group_tree).collect());
        let mut own = vec![
            ("optimizer".into(), self.optimizer.map_or(Tree::None, Tree::Str)),
            ("format".into(), Tree::Int(self.format.into())),
            ("update_count".into(), self.update_count.into()),
            ("skip_count".into(), self.skip_count.into()),
        ];
        own.extend(self.unseen_end.map(|end| ("unseen_end".into(), end.into())));
        if !self.parameters.is_empty() {
            let facts = self.parameters.into_iter().map(|(i, facts)| (index_key(i), facts.into()));
            own.push(("parameters".into(), Tree::Dict(facts.collect())));
        }
        if !shows_step {
            own.push(("steps".into(), Tree::Dict(steps)));
        }
        Tree::dict([("state", state), ("param_groups", groups), ("roptim", Tree::Dict(own))])
    }

    /// From a tree in torch's layout, this library's or another's.
    ///
    /// - Without the key `"roptim"` the optimizer's class is unknown (`None`) and the update count is the
    ///   largest step.
    /// - `step` may be an integer, an integral float, or either as an array without axes. Where there is
    ///   none (torch's SGD keeps none), `roptim.steps` has it, else it is 0: unknown.
    /// - A slot that is `None` is absent.
    /// - Of the keys of a group only those in `declared` are taken, the others ignored; without
    ///   `declared`, all that a hyperparameter could be.
    ///
    /// Errors name the place, such as `state[0].exp_avg`. Whether the state fits an optimizer is checked by
    /// [`Optimizer::load_state_dict`](crate::Optimizer::load_state_dict).
    pub fn from_tree(tree: Tree, declared: Option<&[Hyper]>) -> Result<Self> {
        let root = Path::Root;
        let (mut state, mut groups, mut own) = (None, None, Own::default());
        let mut foreign = true;
        for (key, value) in dict(&root, tree)? {
            let path = root.key(&key);
            match &key {
                Key::Str(name) if name == "state" => state = Some(read_states(&path, value)?),
                Key::Str(name) if name == "param_groups" => groups = Some(read_groups(&path, value, declared)?),
                Key::Str(name) if name == "roptim" => {
                    own = Own::read(&path, value)?;
                    foreign = false;
                }
                _ => return refuse(ErrorKind::Value, "a key", "state, param_groups or roptim", path),
            }
        }
        let Some(state) = state else { return refuse(ErrorKind::Value, "state", "present", "no such key") };
        let Some(groups) = groups else { return refuse(ErrorKind::Value, "param_groups", "present", "no such key") };
        if let Some(stray) = own.steps.keys().find(|i| !state.contains_key(i)) {
            let name = format!("roptim.steps[{stray}]");
            return refuse(ErrorKind::Value, name, "of a parameter with state", "one without");
        }
        if foreign {
            own.update_count = state.values().filter_map(|(step, _)| *step).max().unwrap_or(0);
        }
        let state = state.into_iter().map(|(i, (step, slots))| {
            let step = step.or_else(|| own.steps.get(&i).copied()).unwrap_or(0);
            (i, ParamState { step, slots })
        });
        let state = state.collect();
        let Own { optimizer, update_count, skip_count, unseen_end, parameters, .. } = own;
        Ok(Self { optimizer, format: STATE_FORMAT, update_count, skip_count, unseen_end, groups, parameters, state })
    }
}

impl From<Array> for TensorData {
    fn from(array: Array) -> Self {
        Self { dtype: array.dtype.into(), shape: array.shape, bytes: array.bytes.into() }
    }
}

impl From<ParamFacts> for Tree {
    fn from(facts: ParamFacts) -> Self {
        let shape = facts.shape.into_iter().map(|extent| Self::from(extent as u64)).collect();
        Self::dict([("shape", Self::Tuple(shape)), ("dtype", facts.dtype.name().into())])
    }
}

impl From<Value> for Tree {
    fn from(value: Value) -> Self {
        match value {
            Value::None => Self::None,
            Value::Bool(x) => Self::Bool(x),
            Value::Int(x) => Self::Int(x),
            Value::Float(x) => Self::Float(x),
            Value::Pair(pair) => Self::Tuple(pair.map(Self::Float).into()),
            Value::HalfPair(x) => Self::Tuple(vec![Self::None, Self::Float(x)]),
            Value::Triple(three) => Self::Tuple(three.map(Self::Float).into()),
            Value::Choice(choice) => Self::Str(choice.name().into()),
        }
    }
}

impl From<StateValue> for Tree {
    fn from(value: StateValue) -> Self {
        match value {
            StateValue::None => Self::None,
            StateValue::Count(n) => n.into(),
            StateValue::Number(x) => Self::Float(x),
            StateValue::Array(array) => Self::Tensor(array.into()),
            StateValue::List(items) => Self::List(items.into_iter().map(Self::from).collect()),
        }
    }
}

/// Values by key, and the step where the state has one.
type ReadState = (Option<u64>, BTreeMap<String, StateValue>);

/// What the key `"roptim"` holds.
#[derive(Default)]
struct Own {
    optimizer: Option<String>,
    update_count: u64,
    skip_count: u64,
    unseen_end: Option<u64>,
    steps: BTreeMap<usize, u64>,
    parameters: BTreeMap<usize, ParamFacts>,
}

impl Own {
    fn read(at: &Path<'_>, tree: Tree) -> Result<Self> {
        let mut own = Self::default();
        let (mut format, mut counted) = (None, false);
        for (key, value) in dict(at, tree)? {
            let path = at.key(&key);
            let Key::Str(name) = &key else {
                return refuse(ErrorKind::Value, format!("a key of {at}"), "a string", path);
            };
            match (name.as_str(), value) {
                ("optimizer", Tree::None) => {}
                ("optimizer", Tree::Str(name)) => own.optimizer = Some(name),
                ("optimizer", other) => return wrong_type(&path, "a string or None", &other),
                ("format", value) => format = Some(count(&path, &value)?),
                ("update_count", value) => {
                    own.update_count = count(&path, &value)?;
                    counted = true;
                }
                ("unseen_end", value) => own.unseen_end = Some(count(&path, &value)?),
                ("skip_count", value) => own.skip_count = count(&path, &value)?,
                ("steps", value) => {
                    for (key, value) in dict(&path, value)? {
                        let i = parameter(&path, &key)?;
                        let step = count(&path.key(&key), &value)?;
                        if own.steps.insert(i, step).is_some() {
                            return refuse(ErrorKind::Value, path.key(&key), "in its dict once", "the key twice");
                        }
                    }
                }
                ("parameters", value) => {
                    for (key, value) in dict(&path, value)? {
                        own.parameters.insert(parameter(&path, &key)?, facts(&path.key(&key), value)?);
                    }
                }
                _ => {
                    let allowed = "optimizer, format, update_count, skip_count, unseen_end, steps or parameters";
                    return refuse(ErrorKind::Value, format!("a key of {at}"), allowed, path);
                }
            }
        }
        match format {
            Some(version) if version == u64::from(STATE_FORMAT) => {}
            Some(version) => {
                let error = refuse(ErrorKind::Value, Path::Key(at, "format"), STATE_FORMAT, version);
                return error.map_err(|e: Error| e.with_remedy("use the roptim version that wrote it"));
            }
            None => return refuse(ErrorKind::Value, Path::Key(at, "format"), "present", "no such key"),
        }
        if !counted {
            return refuse(ErrorKind::Value, Path::Key(at, "update_count"), "present", "no such key");
        }
        Ok(own)
    }
}

fn refuse<T>(
    kind: ErrorKind,
    name: impl std::fmt::Display,
    allowed: impl std::fmt::Display,
    got: impl std::fmt::Display,
) -> Result<T> {
    Err(Error::refuse(kind, PLACE, name, allowed, got))
}

fn wrong_type<T>(path: &Path<'_>, allowed: &str, got: &Tree) -> Result<T> {
    refuse(ErrorKind::Type, path, allowed, got.describe())
}

fn index_key(i: usize) -> Key {
    // No machine has 2^63 parameters.
    Key::Int(i as i64)
}

fn dict(path: &Path<'_>, tree: Tree) -> Result<Vec<(Key, Tree)>> {
    let Tree::Dict(items) = tree else { return wrong_type(path, "a dict", &tree) };
    let mut seen = std::collections::HashSet::new();
    match items.iter().find(|(key, _)| !seen.insert(key)) {
        Some((key, _)) => refuse(ErrorKind::Value, path.key(key), "in its dict once", "the key twice"),
        None => Ok(items),
    }
}

fn list(path: &Path<'_>, tree: Tree) -> Result<Vec<Tree>> {
    match tree {
        Tree::List(items) | Tree::Tuple(items) => Ok(items),
        other => wrong_type(path, "a list", &other),
    }
}

fn parameter(at: &Path<'_>, key: &Key) -> Result<usize> {
    match key {
        Key::Int(i) if usize::try_from(*i).is_ok() => Ok(*i as usize),
        _ => refuse(ErrorKind::Value, format!("a key of {at}"), "the index of a parameter", at.key(key)),
    }
}

fn facts(at: &Path<'_>, tree: Tree) -> Result<ParamFacts> {
    let (mut shape, mut dtype) = (None, None);
    for (key, value) in dict(at, tree)? {
        let path = at.key(&key);
        match (&key, value) {
            (Key::Str(name), value) if name == "shape" => {
                let extents =
                    list(&path, value)?.into_iter().enumerate().map(|(i, extent)| count(&path.item(i), &extent));
                // A count of 64 bits that no memory could address is no shape of an array here.
                shape = Some(extents.map(|extent| Ok(extent? as usize)).collect::<Result<Vec<_>>>()?);
            }
            (Key::Str(name), Tree::Str(text)) if name == "dtype" => {
                dtype = DataType::from_name(&text).and_then(DataType::engine);
                if dtype.is_none() {
                    return refuse(ErrorKind::Type, path, "a dtype of parameters", text);
                }
            }
            _ => return refuse(ErrorKind::Value, format!("a key of {at}"), "shape or dtype", path),
        }
    }
    match (shape, dtype) {
        (Some(shape), Some(dtype)) => Ok(ParamFacts { shape, dtype }),
        _ => refuse(ErrorKind::Value, at, "a dict with shape and dtype", "one without"),
    }
}

/// An array or scalar of one element without axes stands for its number.
fn plain(tree: &Tree) -> Option<Tree> {
    match tree {
        Tree::Scalar(tensor) | Tree::Tensor(tensor) => tensor.number(),
        other => Some(other.clone()),
    }
}

fn count(path: &Path<'_>, tree: &Tree) -> Result<u64> {
    let number = match tree {
        Tree::Int(_) | Tree::UInt(_) | Tree::Float(_) | Tree::Scalar(_) | Tree::Tensor(_) => plain(tree),
        _ => None,
    };
    let wanted = "an integer from 0 to 2^64 - 1";
    // 2^64, the first float that is too large.
    const END: f64 = 18_446_744_073_709_551_616.0;
    match number {
        Some(Tree::Int(x)) if x >= 0 => Ok(x.unsigned_abs()),
        Some(Tree::UInt(x)) => Ok(x),
        Some(Tree::Float(x)) if (0.0..END).contains(&x) && x.fract() == 0.0 => Ok(x as u64),
        Some(Tree::Int(_) | Tree::Float(_)) => {
            let got = number.as_ref().map_or_else(String::new, Tree::describe);
            refuse(ErrorKind::Value, path, wanted, got)
        }
        _ => wrong_type(path, wanted, tree),
    }
}

fn group_tree(group: GroupState) -> Tree {
    let mut items: Vec<(Key, Tree)> =
        group.hypers.into_iter().map(|(name, value)| (Key::Str(name), value.into())).collect();
    let params = group.params.into_iter().map(|i| Tree::from(i as u64)).collect();
    items.push(("params".into(), Tree::List(params)));
    if let Some(names) = group.param_names {
        items.push(("param_names".into(), Tree::List(names.into_iter().map(Tree::Str).collect())));
    }
    Tree::Dict(items)
}

fn read_states(at: &Path<'_>, tree: Tree) -> Result<BTreeMap<usize, ReadState>> {
    let mut states = BTreeMap::new();
    for (key, value) in dict(at, tree)? {
        let i = parameter(at, &key)?;
        states.insert(i, read_state(&at.key(&key), value)?);
    }
    Ok(states)
}

fn read_state(at: &Path<'_>, tree: Tree) -> Result<ReadState> {
    let (mut step, mut slots) = (None, BTreeMap::new());
    for (key, value) in dict(at, tree)? {
        let path = at.key(&key);
        let Key::Str(name) = &key else {
            return refuse(ErrorKind::Value, format!("a key of {at}"), "a string", path);
        };
        if name == "step" {
            step = Some(count(&path, &value)?);
        } else if !matches!(value, Tree::None) {
            slots.insert(name.clone(), state_value(&path, value)?);
        }
    }
    Ok((step, slots))
}

fn state_value(path: &Path<'_>, tree: Tree) -> Result<StateValue> {
    Ok(match tree {
        Tree::None => StateValue::None,
        Tree::Int(n) if n >= 0 => StateValue::Count(n.unsigned_abs()),
        Tree::UInt(n) => StateValue::Count(n),
        Tree::Int(n) => StateValue::Number(n as f64),
        Tree::Float(x) => StateValue::Number(x),
        Tree::Tensor(tensor) | Tree::Scalar(tensor) => StateValue::Array(array(path, tensor)?),
        Tree::List(items) | Tree::Tuple(items) => {
            let items = items.into_iter().enumerate().map(|(i, item)| state_value(&path.item(i), item));
            StateValue::List(items.collect::<Result<_>>()?)
        }
        other => return wrong_type(path, "an array or a number", &other),
    })
}

fn array(path: &Path<'_>, tensor: TensorData) -> Result<Array> {
    let Some(dtype) = tensor.dtype.engine() else {
        let known: Vec<_> = DataType::ALL.into_iter().filter(|t| t.engine().is_some()).map(DataType::name).collect();
        return refuse(ErrorKind::Type, path, format!("an array of {}", known.join(" or ")), tensor.dtype);
    };
    tensor.check(PLACE, &path.to_string())?;
    Ok(Array { dtype, shape: tensor.shape, bytes: tensor.bytes.into_vec()? })
}

fn read_groups(at: &Path<'_>, tree: Tree, declared: Option<&[Hyper]>) -> Result<Vec<GroupState>> {
    let groups = list(at, tree)?.into_iter().enumerate();
    groups.map(|(g, tree)| read_group(&at.item(g), tree, declared)).collect()
}

fn read_group(at: &Path<'_>, tree: Tree, declared: Option<&[Hyper]>) -> Result<GroupState> {
    let (mut hypers, mut params, mut param_names) = (BTreeMap::new(), None, None);
    for (key, value) in dict(at, tree)? {
        let path = at.key(&key);
        // Keys that are no strings are the user's own, as are unknown ones.
        let Key::Str(name) = &key else { continue };
        match (name.as_str(), value) {
            ("params", value) => {
                let index = |(i, item): (usize, Tree)| match item {
                    Tree::Int(x) if usize::try_from(x).is_ok() => Ok(x as usize),
                    other => wrong_type(&path.item(i), "the index of a parameter", &other),
                };
                params = Some(list(&path, value)?.into_iter().enumerate().map(index).collect::<Result<_>>()?);
            }
            ("param_names", Tree::None) => {}
            ("param_names", value) => {
                let text = |(i, item): (usize, Tree)| match item {
                    Tree::Str(name) => Ok(name),
                    other => wrong_type(&path.item(i), "a string", &other),
                };
                param_names = Some(list(&path, value)?.into_iter().enumerate().map(text).collect::<Result<_>>()?);
            }
            (name, value) => {
                let known = declared.map(|declared| declared.iter().find(|h| h.name == name));
                match (known, hyper_value(&value)) {
                    (Some(None), _) | (None, None) => {}
                    (_, Some(value)) => {
                        hypers.insert(name.to_owned(), value);
                    }
                    (Some(Some(hyper)), None) => return wrong_type(&path, &hyper.range.to_string(), &value),
                }
            }
        }
    }
    let Some(params) = params else {
        return refuse(ErrorKind::Value, Path::Key(at, "params"), "present", "no such key");
    };
    Ok(GroupState { hypers, params, param_names })
}

/// What a hyperparameter could be, if the value could be one.
fn hyper_value(tree: &Tree) -> Option<Value> {
    let number = |tree: &Tree| match plain(tree)? {
        Tree::Int(x) => Some(x as f64),
        Tree::UInt(x) => Some(x as f64),
        Tree::Float(x) => Some(x),
        _ => None,
    };
    match tree {
        Tree::None => Some(Value::None),
        Tree::Str(name) => Choice::find(name).map(Value::Choice),
        Tree::List(items) | Tree::Tuple(items) => match &items[..] {
            [Tree::None, b] => Some(Value::HalfPair(number(b)?)),
            [a, b] => Some(Value::Pair([number(a)?, number(b)?])),
            [a, b, c] => Some(Value::Triple([number(a)?, number(b)?, number(c)?])),
            _ => None,
        },
        other => match plain(other)? {
            Tree::Bool(x) => Some(Value::Bool(x)),
            Tree::Int(x) => Some(Value::Int(x)),
            _ => number(other).map(Value::Float),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hyper::Range;

    const LR: Hyper = Hyper { name: "lr", default: Value::Float(1e-3), range: Range::AtLeast(0.0), doc: "" };

    fn number(dtype: DataType, bytes: &[u8]) -> Tree {
        Tree::Tensor(TensorData::new(dtype, vec![], bytes.to_vec()).unwrap())
    }

    fn torch(state: Tree, group: Vec<(Key, Tree)>) -> Tree {
        let mut group = group;
        group.push(("params".into(), Tree::List(vec![Tree::Int(0)])));
        let state = Tree::Dict(vec![(Key::Int(0), state)]);
        Tree::dict([("state", state), ("param_groups", Tree::List(vec![Tree::Dict(group)]))])
    }

    #[test]
    fn torch_steps_of_every_type_are_read() {
        let steps = [
            Tree::Int(7),
            Tree::Float(7.0),
            number(DataType::Float32, &7.0f32.to_le_bytes()),
            number(DataType::Float64, &7.0f64.to_le_bytes()),
            number(DataType::Int64, &7i64.to_le_bytes()),
        ];
        for step in steps {
            let dict = StateDict::from_tree(torch(Tree::dict([("step", step)]), vec![]), None).unwrap();
            assert_eq!((dict.state[&0].step, dict.update_count, dict.optimizer), (7, 7, None));
        }
        let none = StateDict::from_tree(torch(Tree::dict([]), vec![]), None).unwrap();
        assert_eq!((none.state[&0].step, none.update_count), (0, 0));
    }

    #[test]
    fn errors_name_the_place() {
        let message = |tree| StateDict::from_tree(tree, Some(&[LR])).unwrap_err().to_string();
        let state = |key, value| message(torch(Tree::dict([(key, value)]), vec![]));
        let cases = [
            (state("step", Tree::Float(1.5)), "state[0].step must be an integer from 0 to 2^64 - 1, got the float 1.5"),
            (
                state("step", Tree::Float(f64::NAN)),
                "state[0].step must be an integer from 0 to 2^64 - 1, got the float NaN",
            ),
            (state("step", Tree::Int(-1)), "state[0].step must be an integer from 0 to 2^64 - 1, got the integer -1"),
            (state("step", "5".into()), "state[0].step must be an integer from 0 to 2^64 - 1, got a string"),
            (state("exp_avg", "x".into()), "state[0].exp_avg must be an array or a number, got a string"),
            (
                state("exp_avg", number(DataType::Int64, &[0; 8])),
                "state[0].exp_avg must be an array of float16 or bfloat16 or float32 or float64 or complex64 or complex128, got int64",
            ),
            (
                message(torch(Tree::dict([]), vec![("lr".into(), "fast".into())])),
                "param_groups[0].lr must be a finite number >= 0, got a string",
            ),
            (message(Tree::Int(1)), "tree must be a dict, got the integer 1"),
            (message(Tree::dict([])), "state must be present, got no such key"),
            (message(Tree::dict([("state", Tree::dict([]))])), "param_groups must be present, got no such key"),
            (message(Tree::dict([("model", Tree::None)])), "a key must be state, param_groups or roptim, got model"),
            (
                message(Tree::dict([("state", Tree::dict([("0", Tree::None)]))])),
                "a key of state must be the index of a parameter, got state.0",
            ),
            (
                message(Tree::dict([("param_groups", Tree::List(vec![Tree::dict([])]))])),
                "param_groups[0].params must be present, got no such key",
            ),
            (
                message(Tree::dict([("roptim", Tree::dict([("format", Tree::Int(9))]))])),
                "roptim.format must be 1, got 9; use the roptim version that wrote it",
            ),
        ];
        for (got, want) in cases {
            assert_eq!(got, format!("state_dict: {want}"));
        }
    }

    #[test]
    fn group_keys_that_are_no_hyperparameters_are_ignored() {
        let group = || {
            vec![
                ("lr".into(), number(DataType::Float32, &0.5f32.to_le_bytes())),
                ("initial_lr".into(), Tree::Float(0.1)),
                ("fused".into(), Tree::None),
                ("betas".into(), Tree::List(vec![Tree::Int(0), Tree::Float(0.5)])),
                (Key::Int(3), Tree::None),
            ]
        };
        let hypers =
            |declared| StateDict::from_tree(torch(Tree::dict([]), group()), declared).unwrap().groups.remove(0).hypers;
        assert_eq!(hypers(Some(&[LR])), BTreeMap::from([("lr".to_owned(), Value::Float(0.5))]));
        let all = hypers(None);
        assert_eq!(all.keys().collect::<Vec<_>>(), ["betas", "fused", "initial_lr", "lr"]);
        assert_eq!(all["betas"], Value::Pair([0.0, 0.5]));
    }
}
