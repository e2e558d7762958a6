//! The file format: round trips, the bytes as they are, what the writer refuses, and what `save` leaves behind.

mod common;

use std::collections::HashSet;
use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use roptim::checkpoint::{
    DataType, Key, MAX_NAME_LEN, MAX_RANK, OsDisk, Series, TensorData, Tree, from_bytes, load, save, to_bytes,
};
use roptim::closure::Ask;
use roptim::rule::Sparse;
use roptim::tensor::Rows;
use roptim::{Dtype, ErrorKind, Optimizer, Options, ParamInfo, REGISTRY, StateDict, TensorRef, Value};

use common::{floats, sample, tensor};

// ---- Round trips ---------------------------------------------------------------------------------------

fn data_type() -> impl Strategy<Value = DataType> {
    proptest::sample::select(DataType::ALL.to_vec())
}

fn any_tensor(axes: std::ops::Range<usize>) -> impl Strategy<Value = TensorData> {
    (data_type(), vec(0usize..4, axes)).prop_flat_map(|(dtype, shape)| {
        let len = shape.iter().product::<usize>() * dtype.size();
        let byte = if dtype == DataType::Bool { 0..=1u8 } else { 0..=u8::MAX };
        vec(byte, len).prop_map(move |bytes| tensor(dtype, &shape, bytes))
    })
}

fn text() -> impl Strategy<Value = String> {
    let awkward =
        ["", ".", "..", "a.b", "a/b", "\"", "\\", "#1", "$tensor", "$$", "%", "[0]", "__metadata__", "é\u{0}\n"];
    prop_oneof![any::<String>(), "[a-z0-9_.]{1,12}", proptest::sample::select(awkward.to_vec()).prop_map(String::from)]
}

fn key() -> impl Strategy<Value = Key> {
    prop_oneof![text().prop_map(Key::Str), any::<i64>().prop_map(Key::Int), (0..4i64).prop_map(Key::Int)]
}

fn any_tree() -> impl Strategy<Value = Tree> {
    let leaf = prop_oneof![
        Just(Tree::None),
        any::<bool>().prop_map(Tree::Bool),
        any::<i64>().prop_map(Tree::Int),
        any::<u64>().prop_map(Tree::from),
        any::<i128>()
            .prop_filter("beyond 64 bits", |x| !(i128::from(i64::MIN)..=u64::MAX.into()).contains(x))
            .prop_map(|x| Tree::BigInt(x.to_string())),
        any::<u64>().prop_map(|bits| Tree::Float(f64::from_bits(bits))),
        proptest::sample::select(vec![0.0, -0.0, f64::NAN, -f64::NAN, f64::INFINITY, -f64::INFINITY, 5e-324, 1e22])
            .prop_map(Tree::Float),
        text().prop_map(Tree::Str),
        any_tensor(0..1).prop_map(Tree::Scalar),
        any_tensor(0..4).prop_map(Tree::Tensor),
    ];
    leaf.prop_recursive(5, 40, 6, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..6).prop_map(Tree::List),
            vec(inner.clone(), 0..6).prop_map(Tree::Tuple),
            vec((key(), inner), 0..6).prop_map(|items| {
                let mut seen = HashSet::new();
                Tree::Dict(items.into_iter().filter(|(key, _)| seen.insert(key.clone())).collect())
            }),
        ]
    })
}

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() })
}

#[test]
fn random_trees_survive_and_open_in_safetensors() {
    let outcome = runner(2000).run(&any_tree(), |tree| {
        let bytes = to_bytes(&tree).unwrap();
        prop_assert_eq!(&bytes, &to_bytes(&tree.clone()).unwrap());
        prop_assert_eq!(&from_bytes(&bytes).unwrap(), &tree);
        // The reference reader asks for a data start at a multiple of 8 only in its documentation.
        let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        prop_assert_eq!((8 + header_len) % 64, 0);
        safetensors::SafeTensors::deserialize(&bytes).unwrap();
        Ok(())
    });
    outcome.unwrap();
}

#[test]
fn other_tools_see_plain_names_types_and_bytes() {
    let tree = Tree::dict([
        ("layer1.weight", floats(&[1.0, 2.0])),
        ("z", Tree::Tensor(tensor(DataType::Complex128, &[2], [3; 32]))),
        ("state", Tree::Dict(vec![(Key::Int(0), Tree::dict([("exp_avg", floats(&[4.0]))]))])),
    ]);
    let bytes = to_bytes(&tree).unwrap();
    let seen = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let weight = seen.tensor("layer1.weight").unwrap();
    assert_eq!((weight.dtype(), weight.shape()), (safetensors::Dtype::F32, &[2][..]));
    assert_eq!(weight.data(), [1.0f32, 2.0].map(f32::to_le_bytes).concat());
    assert_eq!(seen.tensor("z").unwrap().shape(), [2, 2]);
    assert_eq!(seen.tensor("state[0]:exp_avg").unwrap().data(), 4.0f32.to_le_bytes());
}

/// Every file ever written must stay readable: these bytes are the format.
#[test]
fn the_format_is_pinned() {
    let tree = Tree::dict([
        ("lr", Tree::Float(0.001)),
        ("betas", Tree::Tuple(vec![Tree::Float(0.9), Tree::Float(f64::NAN)])),
        ("state", Tree::Dict(vec![(Key::Int(0), Tree::dict([("step", Tree::Int(5)), ("m", floats(&[1.0]))]))])),
        ("$x", Tree::List(vec![Tree::None, Tree::Bool(true), Tree::UInt(u64::MAX), "é\n".into()])),
        ("c", Tree::Scalar(tensor(DataType::Complex128, &[], [0; 16]))),
    ]);
    let bytes = to_bytes(&tree).unwrap();
    let header = concat!(
        r#"{"__metadata__":{"roptim":"{\"format\":1,\"checksum\":\"CHECKSUM\",\"tree\":"#,
        r#"{\"lr\":0.001,\"betas\":{\"$tuple\":[0.9,{\"$float\":\"nan\"}]},"#,
        r##"\"state\":{\"#0\":{\"step\":5,\"m\":{\"$tensor\":\"state[0]:m\"}}},"##,
        r#"\"$$x\":[null,true,18446744073709551615,\"é\\n\"],"#,
        r#"\"c\":{\"$scalar\":\"c\",\"$dtype\":\"complex128\"}}}"},"#,
        r#""c":{"dtype":"F64","shape":[2],"data_offsets":[0,16]},"#,
        r#""state[0]:m":{"dtype":"F32","shape":[1],"data_offsets":[16,20]}}"#,
    );
    let written = String::from_utf8(bytes[8..bytes.len() - 20].to_vec()).unwrap();
    assert_eq!(written.trim_end(), header.replace("CHECKSUM", PINNED_CHECKSUM));
    assert_eq!(from_bytes(&bytes).unwrap(), tree);
}

const PINNED_CHECKSUM: &str = "68b6bfa59f770edd86a591a4424b9682";

#[test]
fn names_and_shapes_at_their_limits_come_back() {
    let key = "k".repeat(MAX_NAME_LEN);
    let tree = Tree::dict([
        (key.as_str(), floats(&[1.5])),
        ("axes", Tree::Tensor(tensor(DataType::Int8, &[1; MAX_RANK], [3]))),
        ("parts", Tree::Tensor(tensor(DataType::Complex64, &[1; MAX_RANK - 1], [4; 8]))),
    ]);
    assert_eq!(from_bytes(&to_bytes(&tree).unwrap()).unwrap(), tree);
}

// ---- What the writer refuses ---------------------------------------------------------------------------

#[test]
fn trees_that_no_reader_would_take_are_not_written() {
    let mut deep = Tree::None;
    for _ in 0..61 {
        deep = Tree::List(vec![deep]);
    }
    let broken = TensorData { dtype: DataType::Float32, shape: vec![2], bytes: vec![0; 7].into() };
    let twice = Tree::Dict(vec![(Key::Int(1), Tree::None), (Key::Int(1), Tree::None)]);
    let long = Tree::Dict(vec![(Key::Str("k".repeat(5000)), floats(&[]))]);
    let cases = [
        (deep, "must be at most 60 levels deep, got another level"),
        (Tree::dict([("a", Tree::Tensor(broken))]), "a must be 8 bytes for shape [2] of float32, got 7 bytes"),
        (Tree::dict([("a", twice)]), "a[1] must be in its dict once, got the key twice"),
        (long, "must be at most 4096 bytes, got 5000"),
        (Tree::UInt(5), "tree must be Tree::Int below 2^63, got Tree::UInt(5)"),
        (Tree::Scalar(tensor(DataType::Int8, &[1], [0])), "tree must be without axes as a scalar, got shape [1]"),
        (Tree::Tensor(tensor(DataType::Bool, &[1], [2])), "tree must be of the bytes 0 and 1 as a bool array"),
        (Tree::Tensor(tensor(DataType::Int8, &[1; 33], [2])), "tree must be of at most 32 axes, got 33"),
        (Tree::Tensor(tensor(DataType::Complex128, &[1; 32], [2; 16])), "tree must be of at most 31 axes, got 32"),
        (Tree::List(vec![Tree::Int(i64::MAX); 1 << 20]), "the header must be at most 16777216 bytes"),
    ];
    for (tree, part) in cases {
        let error = to_bytes(&tree).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Value);
        assert!(error.to_string().contains(part), "want {part:?}\n got {:?}", error.to_string());
    }
}

// ---- Files ---------------------------------------------------------------------------------------------

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_saved_file_is_loaded_and_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.ckpt");
    for tree in [sample(), Tree::Int(1)] {
        save(&path, &tree).unwrap();
        assert_eq!(fs::read(&path).unwrap(), to_bytes(&tree).unwrap());
        assert_eq!(load(&path).unwrap(), tree);
    }
    assert_eq!(names(directory.path()), ["model.ckpt"]);
}

#[test]
fn a_failed_save_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.ckpt");
    save(&path, &sample()).unwrap();
    let before = fs::read(&path).unwrap();
    let error = save(&path, &Tree::UInt(1)).unwrap_err();
    assert!(error.to_string().contains("model.ckpt: tree must be"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), before);

    let error = save(directory.path().join("missing/model.ckpt"), &sample()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("missing/model.ckpt: the directory could not be opened"), "{error}");
    assert!(std::error::Error::source(&error).is_some());

    fs::create_dir(directory.path().join("full")).unwrap();
    fs::write(directory.path().join("full/inner"), "x").unwrap();
    for (target, part) in [("full", "a regular file or absent, got a directory"), ("model.ckpt/x", "could not be")] {
        let error = save(directory.path().join(target), &sample()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains(part), "{error}");
    }
    assert_eq!(save("", &sample()).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(names(directory.path()), ["full", "model.ckpt"]);
    assert_eq!(names(&directory.path().join("full")), ["inner"]);
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn what_cannot_be_read_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("absent");
    let error = load(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("absent: the file could not be read"), "{error}");
    assert_eq!(load(directory.path()).unwrap_err().kind(), ErrorKind::Io);
    fs::write(&path, b"PK\x03\x04").unwrap();
    let error = load(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::File);
    assert!(error.to_string().contains("absent: the file must be one that roptim wrote, got a zip archive"), "{error}");
}

#[cfg(unix)]
mod unix {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn permissions_are_the_usual_or_the_old_ones() {
        let directory = tempfile::tempdir().unwrap();
        let usual = directory.path().join("usual");
        fs::write(&usual, "").unwrap();
        let path = directory.path().join("model.ckpt");
        save(&path, &sample()).unwrap();
        assert_eq!(mode(&path), mode(&usual));
        for bits in [0o600, 0o640, 0o666, 0o444] {
            fs::set_permissions(&path, fs::Permissions::from_mode(bits)).unwrap();
            save(&path, &sample()).unwrap();
            assert_eq!(mode(&path), bits);
        }
    }

    #[test]
    fn a_link_stays_and_its_file_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("real")).unwrap();
        let file = directory.path().join("real/model.ckpt");
        let link = directory.path().join("link");
        symlink("real/model.ckpt", &link).unwrap();
        for tree in [sample(), Tree::Int(1)] {
            save(&link, &tree).unwrap();
            assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
            assert!(fs::symlink_metadata(&file).unwrap().is_file());
            assert_eq!(load(&link).unwrap(), tree);
        }
        let ring = directory.path().join("ring");
        symlink("ring", &ring).unwrap();
        assert!(save(&ring, &sample()).unwrap_err().to_string().contains("the path could not be followed"));
        assert_eq!(names(directory.path()), ["link", "real", "ring"]);
        assert_eq!(names(&directory.path().join("real")), ["model.ckpt"]);
    }

    #[test]
    fn devices_are_left_alone() {
        assert!(save("/dev/null", &sample()).unwrap_err().to_string().contains("got a device, pipe or socket"));
        assert_eq!(load("/dev/null").unwrap_err().kind(), ErrorKind::Io);
    }
}

#[test]
fn a_damaged_checkpoint_takes_nobodys_place() {
    let directory = tempfile::tempdir().unwrap();
    // Opened anew each time: what one wrote is known to it.
    let save = |step| {
        let series = Series::open(OsDisk, directory.path(), NonZeroUsize::new(2)).unwrap();
        series.save(step, &floats(&[step as f32]), &mut |_, _| Ok(())).unwrap();
        let files = series.steps().unwrap();
        (files, series.path(step))
    };
    save(1);
    let (_, second) = save(2);
    let whole = fs::read(&second).unwrap();
    fs::write(&second, &whole[..whole.len() - 1]).unwrap();
    assert_eq!(save(3).0, [1, 2, 3]);
    assert_eq!(save(4).0, [3, 4]);
    assert_eq!(save(5).0, [4, 5]);
}

// ---- Optimizers ----------------------------------------------------------------------------------------

type Params = (Vec<f32>, Vec<f64>);

fn optimizer(name: &str) -> Optimizer {
    let mut optimizer = Optimizer::cpu(name, &Options { threads: Some(1), ..Options::default() }).unwrap();
    let hypers = if name == "SGD" { vec![("momentum", Value::Float(0.9))] } else { vec![] };
    let w = ParamInfo { name: Some("W".into()), shape: vec![2, 3], dtype: Dtype::F32, resident: false };
    optimizer.add_group(&hypers, vec![w]).unwrap();
    let unnamed = ParamInfo { name: None, shape: vec![4], dtype: Dtype::F64, resident: false };
    let matrix = ParamInfo { shape: vec![2, 2], ..unnamed.clone() };
    // Methods that take a closure have one learning rate.
    let lr = if optimizer.preset().needs_closure() { vec![] } else { vec![("lr", Value::Float(0.1))] };
    if optimizer.add_group(&lr, vec![unnamed]).is_err() {
        optimizer.add_group(&lr, vec![matrix]).unwrap();
    }
    optimizer
}

fn steps(optimizer: &mut Optimizer, (w, b): &mut Params, count: usize) {
    let sparse = optimizer.preset().declaration().sparse == Sparse::Required;
    let rows = |n: usize| Rows::new((0..n).collect(), 1, n).unwrap();
    for k in 0..count {
        let gw: Vec<f32> = w.iter().map(|x| x * 0.3 + k as f32).collect();
        let gb: Vec<f64> = b.iter().map(|x| x * 0.7 - 1.0).collect();
        let (mut gw, mut gb) = (TensorRef::from(gw.as_slice()), TensorRef::from(gb.as_slice()));
        if sparse {
            (gw, gb) = (gw.of_rows(rows(6)), gb.of_rows(rows(4)));
        }
        let gradients = [Some(gw), (k % 2 == 0).then_some(gb)];
        let params = &mut [w.as_mut_slice().into(), b.as_mut_slice().into()];
        if !optimizer.preset().needs_closure() {
            optimizer.step(params, &gradients).unwrap();
            continue;
        }
        optimizer.begin(params).unwrap();
        let mut loss = 0.0;
        while optimizer.tell(loss, params, &gradients).unwrap() == Ask::Evaluate {
            loss -= 1.0;
        }
    }
}

#[test]
fn a_loaded_optimizer_goes_on_bit_for_bit() {
    for preset in REGISTRY {
        let mut params: Params = (vec![1.0, -2.0, 0.5, 3.0, 0.1, -0.7], vec![0.25, -4.0, 1e-3, 9.0]);
        let mut first = optimizer(preset.name);
        steps(&mut first, &mut params, 7);
        let saved = first.state_dict().unwrap();
        let declaration = preset.declaration();
        let tree = saved.clone().into_tree(declaration.shows_step);
        let state = tree.get("state").unwrap();
        let Tree::Dict(states) = state else { panic!("a dict") };
        assert!(
            states.iter().all(|(_, state)| state.get("step").is_some() == declaration.shows_step),
            "{}",
            preset.name
        );

        let bytes = to_bytes(&tree).unwrap();
        let loaded = StateDict::from_tree(from_bytes(&bytes).unwrap(), Some(declaration.hypers)).unwrap();
        assert_eq!(loaded, saved, "{}", preset.name);
        let undeclared = StateDict::from_tree(tree, None).unwrap();
        assert_eq!(undeclared, saved, "{}", preset.name);
        let json = serde_json::to_string(&saved).unwrap();
        assert_eq!(serde_json::from_str::<StateDict>(&json).unwrap(), saved, "{}", preset.name);

        let mut second = optimizer(preset.name);
        second.load_state_dict(&loaded).unwrap();
        let mut again = params.clone();
        steps(&mut first, &mut params, 5);
        steps(&mut second, &mut again, 5);
        assert_eq!(params, again, "{}", preset.name);
        assert_eq!(first.state_dict().unwrap(), second.state_dict().unwrap(), "{}", preset.name);
    }
}

#[test]
fn a_state_of_torch_is_taken() {
    let mut params: Params = (vec![1.0; 6], vec![2.0; 4]);
    let mut first = optimizer("Adam");
    steps(&mut first, &mut params, 3);
    let saved = first.state_dict().unwrap();
    let Tree::Dict(items) = saved.clone().into_tree(true) else { panic!("a dict") };
    let foreign = Tree::Dict(items.into_iter().filter(|(key, _)| *key != Key::from("roptim")).collect());
    let loaded = StateDict::from_tree(foreign, Some(first.preset().declaration().hypers)).unwrap();
    assert_eq!(loaded, StateDict { optimizer: None, parameters: Default::default(), ..saved });
    optimizer("Adam").load_state_dict(&loaded).unwrap();
}

// ---- serde ---------------------------------------------------------------------------------------------

#[test]
fn trees_are_the_same_in_a_file_in_json_and_in_a_binary_format() {
    let outcome = runner(1000).run(&any_tree(), |tree| {
        let text = serde_json::to_string(&tree).unwrap();
        prop_assert_eq!(&serde_json::from_str::<Tree>(&text).unwrap(), &tree);
        let bytes = postcard::to_stdvec(&tree).unwrap();
        prop_assert_eq!(&postcard::from_bytes::<Tree>(&bytes).unwrap(), &tree);
        Ok(())
    });
    outcome.unwrap();
    let text = serde_json::to_string(&sample()).unwrap();
    assert_eq!(serde_json::from_str::<Tree>(&text).unwrap(), sample());
}

#[test]
fn json_is_readable_and_refused_where_it_is_no_tree() {
    let tree = Tree::dict([
        ("lr", Tree::Float(f64::INFINITY)),
        ("steps", Tree::Tuple(vec![Tree::Int(1)])),
        ("W", floats(&[0.5, f32::NAN])),
        ("flag", Tree::Scalar(tensor(DataType::Bool, &[], [1]))),
    ]);
    let text = concat!(
        r#"{"lr":{"$float":"inf"},"steps":{"$tuple":[1]},"#,
        r#""W":{"$tensor":{"dtype":"float32","shape":[2],"data":[0.5,"nan:7fc00000"]}},"#,
        r#""flag":{"$scalar":{"dtype":"bool","shape":[],"data":[true]}}}"#
    );
    assert_eq!(serde_json::to_string(&tree).unwrap(), text);
    let holding =
        |dtype: &str, data: &str| format!(r#"{{"$tensor":{{"dtype":"{dtype}","shape":[1],"data":[{data}]}}}}"#);
    for (text, want) in [
        (holding("int8", "128"), "JSON: data must be of numbers that int8 holds exactly, got 128"),
        (holding("uint8", "-1"), "JSON: data must be of numbers that uint8 holds exactly, got -1"),
        (holding("float32", "0.1"), "JSON: data must be of numbers that float32 holds exactly, got 0.1"),
        (
            holding("float16", "\"nan:7c00\""),
            "JSON: data must be of numbers that float16 holds exactly, got \"nan:7c00\"",
        ),
        (holding("bool", "1"), "JSON: data must be of numbers that bool holds exactly, got 1"),
        (holding("float32", ""), "JSON: data must be as many numbers as the shape asks for, got 0 for [1]"),
        (holding("object", "1"), "JSON: a tensor must be of a known dtype, with shape and data, got another"),
        (r#"{"a":1,"a":1}"#.into(), "the key \"a\" twice"),
        (r#"{"$tensor":"W"}"#.into(), "JSON: $tensor must be an object, got \"W\""),
        (
            r#"{"$scalar":{"dtype":"int8","shape":[1],"data":[1]}}"#.into(),
            "JSON: $scalar must be without axes, got [1]",
        ),
        (r#"{"$int":"5"}"#.into(), "JSON: $int must be an integer beyond 64 bits"),
    ] {
        let error = serde_json::from_str::<Tree>(&text).unwrap_err().to_string();
        assert!(error.contains(want), "{text}: {error}");
    }
    let twice = Tree::Dict(vec![("a".into(), Tree::None), ("a".into(), Tree::None)]);
    assert!(serde_json::to_string(&twice).unwrap_err().to_string().contains("the key twice"));
}

/// Files of every version so far; `tests/checkpoints/README.md` says what they are.
#[test]
fn checkpoints_that_were_kept_are_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/checkpoints");
    let mut read = 0;
    for version in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        for path in fs::read_dir(version).unwrap().map(|entry| entry.unwrap().path()) {
            if path.extension().is_some_and(|extension| extension == "json") {
                let twin: Tree = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
                assert_eq!(twin, load(path.with_extension("safetensors")).unwrap());
                continue;
            }
            let tree = load(&path).unwrap();
            assert_eq!(to_bytes(&tree).unwrap(), fs::read(&path).unwrap(), "{}", path.display());
            if let Some(state) = tree.get("run").and_then(|run| run.get("optimizer")) {
                // Schedules are the Python package's.
                let Tree::Dict(mut items) = state.clone() else { panic!("a dict") };
                for (_, value) in items.iter_mut().filter(|(key, _)| *key == Key::from("roptim")) {
                    let Tree::Dict(about) = value else { panic!("a dict") };
                    about.retain(|(key, _)| *key != Key::from("schedules"));
                }
                let state = StateDict::from_tree(Tree::Dict(items), None).unwrap();
                assert!(state.update_count > 0 && state.parameters.len() == 2, "{}", path.display());
            }
            read += 1;
        }
    }
    assert!(read >= 10, "{read} files");
}
