//! Every shader is the twin of a rule: validated by naga, names and counts compared with the Rust
//! declarations by reflection. Needs no GPU.

use std::collections::BTreeSet;

use naga::valid::{Capabilities, ValidationFlags, Validator};
use roptim::rules::RuleId;
use roptim::shader;

fn with_shader() -> impl Iterator<Item = RuleId> {
    RuleId::ALL.iter().copied().filter(|rule| rule.shader().is_some())
}

fn parse(rule: RuleId, kernel: &roptim::rule::KernelFacts) -> naga::Module {
    let text = shader::module(rule, kernel);
    let module = naga::front::wgsl::parse_str(&text)
        .unwrap_or_else(|e| panic!("{} does not parse:\n{}", kernel.entry, e.emit_to_string(&text)));
    // Default capabilities: what every adapter has, no f64 and no extensions.
    Validator::new(ValidationFlags::all(), Capabilities::default())
        .validate(&module)
        .unwrap_or_else(|e| panic!("{} is not valid: {e:?}", kernel.entry));
    module
}

fn every_kernel(mut check: impl FnMut(RuleId, &roptim::rule::KernelFacts, &naga::Module)) {
    for rule in with_shader() {
        for kernel in rule.kernels() {
            check(rule, &kernel, &parse(rule, &kernel));
        }
    }
}

fn fields(module: &naga::Module, ty: naga::Handle<naga::Type>) -> Vec<(String, u32, naga::Handle<naga::Type>)> {
    let naga::TypeInner::Struct { members, .. } = &module.types[ty].inner else { panic!("a struct was expected") };
    members.iter().map(|m| (m.name.clone().unwrap_or_default(), m.offset, m.ty)).collect()
}

#[test]
fn each_rule_has_one_shader_file_and_each_file_a_rule() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/rules");
    let files: BTreeSet<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap().trim_end_matches(".wgsl").to_owned())
        .collect();
    let stems: BTreeSet<String> = with_shader().map(|rule| rule.declaration().stem.to_owned()).collect();
    assert_eq!(files, stems);
    for rule in with_shader() {
        let twin = format!("// Twin of src/rules/{}.rs.\n", rule.declaration().stem);
        assert!(rule.shader().unwrap().starts_with(&twin), "{} must begin with {twin:?}", rule.declaration().stem);
    }
}

#[test]
fn coefficients_are_named_and_ordered_as_in_rust() {
    every_kernel(|_, kernel, module| {
        let function = module.functions.iter().find(|(_, f)| f.name.as_deref() == Some(kernel.entry));
        let (_, function) = function.unwrap_or_else(|| panic!("no function {}", kernel.entry));
        let scalars = fields(module, function.arguments[0].ty);
        let names: Vec<&str> = scalars.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(names, kernel.coefficients, "coefficients of {}", kernel.entry);
        for (i, (name, offset, ty)) in scalars.iter().enumerate() {
            let float = naga::TypeInner::Scalar(naga::Scalar::F32);
            assert_eq!((&module.types[*ty].inner, *offset), (&float, 4 * i as u32), "{} of {}", name, kernel.entry);
        }
        // Coefficients, parameter, gradient, then the slots by pointer.
        assert_eq!(function.arguments.len(), 3 + kernel.slots.len(), "arguments of {}", kernel.entry);
        for slot in &function.arguments[3..] {
            assert!(matches!(
                module.types[slot.ty].inner,
                naga::TypeInner::Pointer { space: naga::AddressSpace::Function, .. }
            ));
        }
    });
}

#[test]
fn bindings_and_layouts_are_what_the_executor_fills() {
    every_kernel(|_, kernel, module| {
        let mut bindings: Vec<u32> =
            module.global_variables.iter().map(|(_, v)| v.binding.as_ref().unwrap().binding).collect();
        bindings.sort_unstable();
        let count = shader::FIRST_SLOT_BINDING + kernel.slots.len() as u32;
        assert_eq!(bindings, (0..count).collect::<Vec<_>>(), "bindings of {}", kernel.entry);
        assert!(count <= 8, "WebGPU guarantees 8 storage buffers");
        let stride = |binding: u32| {
            let found = module.global_variables.iter().find(|(_, v)| v.binding.as_ref().unwrap().binding == binding);
            match module.types[found.unwrap().1.ty].inner {
                naga::TypeInner::Array { stride, .. } => stride as usize,
                ref other => panic!("an array was expected, found {other:?}"),
            }
        };
        assert_eq!(stride(2), 4 * shader::CHUNK_WORDS);
        assert_eq!(stride(3), 4 * shader::ROW_WORDS);
        let row = module.types.iter().find(|(_, t)| t.name.as_deref() == Some("Row")).unwrap().0;
        assert_eq!(fields(module, row)[1].1 as usize, 4 * shader::FRAME_WORDS, "the coefficients follow the frame");
        assert_eq!(module.entry_points.len(), 1);
        assert_eq!(module.entry_points[0].name, shader::ENTRY_POINT);
    });
}

#[test]
fn a_rule_uses_the_slots_it_declares() {
    for &rule in RuleId::ALL {
        let used: BTreeSet<usize> = rule.kernels().iter().flat_map(|k| k.slots).copied().collect();
        assert!(used.iter().copied().eq(0..rule.declaration().slots.len()), "slots of {}", rule.declaration().stem);
    }
}

#[test]
fn operations_on_vectors_are_valid_and_laid_out_as_the_host_fills_them() {
    let text = shader::vector_module();
    let module = naga::front::wgsl::parse_str(&text).unwrap_or_else(|e| panic!("{}", e.emit_to_string(&text)));
    let info = Validator::new(ValidationFlags::all(), Capabilities::default()).validate(&module).unwrap();
    let names: Vec<&str> = module.entry_points.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(names, shader::VECTOR_ENTRY_POINTS);
    let operation = module.types.iter().find(|(_, t)| t.name.as_deref() == Some("Operation")).unwrap().0;
    let offsets = fields(&module, operation).into_iter().map(|(_, offset, _)| offset as usize);
    assert!(offsets.eq((0..shader::OPERATION_WORDS).map(|i| 4 * i)));
    // Every entry point that adds numbers of two f32 says what zero is, and none takes more memory than WebGPU
    // guarantees a workgroup.
    let is_zero = |name: &Option<String>| name.as_deref() == Some("unseen_zero");
    let zero = module.global_variables.iter().find(|(_, v)| is_zero(&v.name)).unwrap().0;
    for (i, entry) in module.entry_points.iter().enumerate() {
        let uses = info.get_entry_point(i);
        assert!(uses[zero].is_empty() || uses[zero].contains(naga::valid::GlobalUse::WRITE), "{}", entry.name);
        let shared = module
            .global_variables
            .iter()
            .filter(|&(handle, v)| v.space == naga::AddressSpace::WorkGroup && !uses[handle].is_empty());
        let bytes: u32 = shared.map(|(_, v)| module.types[v.ty].inner.size(module.to_ctx())).sum();
        assert!(bytes <= 16 << 10, "{}: {bytes}", entry.name);
    }
}
