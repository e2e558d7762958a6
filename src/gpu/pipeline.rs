//! A kernel compiled for a device.

use super::context::Context;
use crate::rule::KernelFacts;
use crate::rules::RuleId;
use crate::shader;

/// A kernel's compiled module and the layout of its bindings.
#[derive(Debug)]
pub(super) struct Pipeline {
    pub(super) layout: wgpu::BindGroupLayout,
    pub(super) compute: wgpu::ComputePipeline,
}

impl Pipeline {
    /// Compiles; errors go to the scope around the call.
    pub(super) fn new(context: &Context, rule: RuleId, kernel: &KernelFacts) -> Self {
        let device = &context.device;
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some(kernel.entry),
            source: wgpu::ShaderSource::Wgsl(shader::module(rule, kernel).into()),
        });
        let writable = |binding: u32| binding == 0 || binding >= shader::FIRST_SLOT_BINDING;
        let entries: Vec<_> = (0..shader::FIRST_SLOT_BINDING + kernel.slots.len() as u32)
            .map(|binding| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Storage { read_only: !writable(binding) },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(kernel.entry),
            entries: &entries,
        });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(kernel.entry),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        // Small workgroups suit software adapters; GPUs hide memory latency with larger ones.
        let workgroup = if context.info.software { 64.0 } else { 256.0 };
        let compute = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(kernel.entry),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some(shader::ENTRY_POINT),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &[("WORKGROUP", workgroup)],
                ..Default::default()
            },
            cache: None,
        });
        Self { layout, compute }
    }
}
