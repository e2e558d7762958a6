//! Every shader is the twin of a rule: validated by naga, names and counts compared with the Rust
//! declarations by reflection. Needs no GPU.

use std::collections::BTreeSet;

use naga::valid::{Capabilities, ValidationFlags, Validator};
use roptim::Dtype;
use roptim::rule::{MAX_AREAS, MAX_COEFFICIENTS, MAX_SLOTS, MAX_UNITS, Program};
use roptim::rules::{RuleId, TensorRuleId};
use roptim::shader;

fn with_shader() -> impl Iterator<Item = RuleId> {
    RuleId::ALL.iter().copied().filter(|rule| rule.shader().is_some())
}

fn validated(what: &str, text: &str) -> naga::Module {
    validated_with_info(what, text).0
}

fn validated_with_info(what: &str, text: &str) -> (naga::Module, naga::valid::ModuleInfo) {
    let module = naga::front::wgsl::parse_str(text)
        .unwrap_or_else(|e| panic!("{what} does not parse:\n{}", e.emit_to_string(text)));
    // Default capabilities: what every adapter has, no f64 and no extensions.
    let info = Validator::new(ValidationFlags::all(), Capabilities::default())
        .validate(&module)
        .unwrap_or_else(|e| panic!("{what} is not valid: {e:?}"));
    (module, info)
}

const STORED: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

/// Each kernel, with parameters of every storage type and gradients of the same or float32.
fn every_kernel(mut check: impl FnMut(RuleId, &roptim::rule::KernelFacts, &naga::Module)) {
    for rule in with_shader() {
        for kernel in rule.kernels() {
            for parameter in STORED {
                for gradient in BTreeSet::from([parameter, Dtype::F32]) {
                    let module = shader::update(rule, &kernel, parameter, gradient);
                    assert_eq!(module.written.len(), shader::FIRST_SLOT_BINDING as usize + kernel.slots.len());
                    check(rule, &kernel, &validated(kernel.entry, &module.text));
                }
            }
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
    let elementwise = with_shader().map(|rule| (rule.declaration().stem, rule.shader().unwrap()));
    let of_tensors = TensorRuleId::ALL.iter().map(|rule| (rule.declaration().stem, rule.shader()));
    let texts: Vec<_> = elementwise.chain(of_tensors).collect();
    assert_eq!(files, texts.iter().map(|(stem, _)| (*stem).to_owned()).collect());
    for (stem, text) in texts {
        let twin = format!("// Twin of src/rules/{stem}.rs.\n");
        assert!(text.starts_with(&twin), "{stem} must begin with {twin:?}");
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

/// A struct whose last member is an array of elements of so many words, after a head of so many.
fn struct_ends_in_array_of(module: &naga::Module, name: &str, head: usize, element: usize) {
    let ty = module.types.iter().find(|(_, t)| t.name.as_deref() == Some(name)).unwrap().0;
    let members = fields(module, ty);
    let (_, offset, last) = members.last().unwrap();
    let naga::TypeInner::Array { stride, .. } = module.types[*last].inner else { panic!("{name} ends in no array") };
    assert_eq!((*offset as usize, stride as usize), (4 * head, 4 * element), "{name}");
}

#[test]
fn modules_of_the_guard_and_of_gradients_are_what_the_executor_fills() {
    let of_gradients = |make: fn(Dtype) -> shader::Module| STORED.map(make).to_vec();
    let all = [of_gradients(shader::measure), of_gradients(shader::sum_into), of_gradients(shader::scale)].concat();
    for made in all.into_iter().chain([shader::decide()]) {
        let module = validated(made.entry, &made.text);
        for (_, variable) in module.global_variables.iter() {
            let Some(binding) = &variable.binding else { continue };
            let naga::AddressSpace::Storage { access } = variable.space else { panic!("a storage buffer") };
            let written = access.contains(naga::StorageAccess::STORE);
            assert_eq!(made.written[binding.binding as usize], written, "{} {:?}", made.entry, variable.name);
        }
        let size = |name: &str| {
            let found = module.types.iter().find(|(_, t)| t.name.as_deref() == Some(name));
            found.map(|(_, t)| t.inner.size(module.to_ctx()) as usize / 4)
        };
        assert!(size("Control").is_none_or(|words| words == shader::CONTROL_WORDS));
        assert!(size("Partial").is_none_or(|words| words == shader::PARTIAL_WORDS));
        assert_eq!(module.entry_points.len(), 1);
        assert_eq!(module.entry_points[0].name, made.entry);
    }
}

#[test]
fn passes_of_tensor_rules_are_what_the_executor_runs() {
    for &rule in TensorRuleId::ALL {
        let (program, declared) = (rule.program(), rule.declaration());
        assert!(program.units.len() <= MAX_UNITS && program.areas.len() <= MAX_AREAS, "{}", declared.stem);
        assert!(!program.units[Program::CHUNK_UNIT].by_lane && program.coefficients.len() <= MAX_COEFFICIENTS);
        let entries: BTreeSet<&str> = program.passes.iter().map(|pass| pass.entry).collect();
        assert_eq!(entries.len(), program.passes.len(), "{}", declared.stem);
        for (parameter, gradient) in STORED.into_iter().flat_map(|p| [(p, p), (p, Dtype::F32)]) {
            let made = shader::tensors(rule, &program.passes[0], parameter, gradient);
            let (module, info) = validated_with_info(declared.stem, &made.text);
            let mut names = vec!["parameters", "gradients", "table", "work"];
            names.extend(declared.slots.iter().map(|slot| slot.name));
            names.extend(program.areas.iter().map(|area| area.name));
            assert!(names.len() <= 8, "WebGPU guarantees 8 storage buffers");
            assert_eq!(made.written.len(), names.len());
            for (_, variable) in module.global_variables.iter() {
                let Some(binding) = &variable.binding else { continue };
                let naga::AddressSpace::Storage { access } = variable.space else { panic!("a storage buffer") };
                let written = access.contains(naga::StorageAccess::STORE);
                assert_eq!(made.written[binding.binding as usize], written, "{:?}", variable.name);
                assert_eq!(variable.name.as_deref(), Some(names[binding.binding as usize]));
            }
            let found: BTreeSet<&str> = module.entry_points.iter().map(|e| e.name.as_str()).collect();
            assert_eq!(found, entries, "entry points of {}", declared.stem);
            assert!(module.entry_points.iter().all(|e| e.workgroup_size.iter().product::<u32>() <= 256));
            let ty = |name: &str| module.types.iter().find(|(_, t)| t.name.as_deref() == Some(name)).unwrap().0;
            let scalars: Vec<String> = fields(&module, ty("Scalars")).into_iter().map(|(name, ..)| name).collect();
            assert_eq!(scalars, program.coefficients, "coefficients of {}", declared.stem);
            struct_ends_in_array_of(&module, "Tensors", shader::TENSORS_WORDS, shader::TENSOR_WORDS);
            struct_ends_in_array_of(&module, "Work", shader::CONTROL_WORDS, shader::ROW_WORDS);
            let offsets: Vec<usize> = fields(&module, ty("Tensor")).iter().map(|f| f.1 as usize / 4).skip(8).collect();
            let head = shader::TENSOR_HEAD_WORDS;
            assert_eq!(offsets, [head, head + MAX_SLOTS, head + MAX_SLOTS + MAX_AREAS]);
            for (index, entry) in module.entry_points.iter().enumerate() {
                let used = info.get_entry_point(index);
                let zero = module.global_variables.iter().find(|(_, v)| v.name.as_deref() == Some("unseen_zero"));
                let zero = used[zero.unwrap().0];
                assert!(zero.is_empty() || zero.contains(naga::valid::GlobalUse::WRITE), "{}", entry.name);
                let uses = |handle: naga::Handle<naga::GlobalVariable>| !used[handle].is_empty();
                let bytes = |(handle, v): (_, &naga::GlobalVariable)| match module.types[v.ty].inner {
                    _ if v.space != naga::AddressSpace::WorkGroup || !uses(handle) => 0,
                    // As many as a workgroup has lanes.
                    naga::TypeInner::Array { stride, size: naga::ArraySize::Pending(_), .. } => 256 * stride,
                    ref inner => inner.size(module.to_ctx()),
                };
                let shared: u32 = module.global_variables.iter().map(bytes).sum();
                assert!(shared <= 16 << 10, "{} needs {shared} bytes of shared memory", entry.name);
            }
        }
    }
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
        struct_ends_in_array_of(module, "Table", shader::TABLE_WORDS, shader::CHUNK_WORDS);
        struct_ends_in_array_of(module, "Work", shader::CONTROL_WORDS, shader::ROW_WORDS);
        let row = module.types.iter().find(|(_, t)| t.name.as_deref() == Some("Row")).unwrap().0;
        assert_eq!(fields(module, row)[1].1 as usize, 4 * shader::FRAME_WORDS, "the coefficients follow the frame");
        assert_eq!(module.entry_points.len(), 1);
        assert_eq!(module.entry_points[0].name, "step");
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
