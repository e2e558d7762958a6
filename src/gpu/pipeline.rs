//! A module compiled for a device.

use super::context::Context;
use crate::shader::Module;

/// A compiled module and the layout of its bindings.
#[derive(Debug)]
pub(super) struct Pipeline {
    pub(super) layout: wgpu::BindGroupLayout,
    pub(super) compute: wgpu::ComputePipeline,
}

impl Pipeline {
    /// Compiles; errors go to the scope around the call.
    pub(super) fn new(context: &Context, label: &str, module: &Module) -> Self {
        let device = &context.device;
        let source = wgpu::ShaderSource::Wgsl(module.text.as_str().into());
        let compiled = device.create_shader_module(wgpu::ShaderModuleDescriptor { label: Some(label), source });
        let entries: Vec<_> = (0..)
            .zip(&module.written)
            .map(|(binding, written)| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Storage { read_only: !written },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let layout =
            device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(label), entries: &entries });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(label),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        // Small workgroups suit software adapters; GPUs hide memory latency with larger ones.
        let workgroup = if context.info.software { 64.0 } else { 256.0 };
        let compute = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(label),
            layout: Some(&pipeline_layout),
            module: &compiled,
            entry_point: Some(module.entry),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &[("WORKGROUP", workgroup)],
                ..Default::default()
            },
            cache: None,
        });
        Self { layout, compute }
    }

    /// Buffers in the order of the module's bindings.
    pub(super) fn bind(&self, context: &Context, label: &str, buffers: &[&wgpu::Buffer]) -> wgpu::BindGroup {
        let entries: Vec<_> = (0..)
            .zip(buffers)
            .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() })
            .collect();
        let descriptor = wgpu::BindGroupDescriptor { label: Some(label), layout: &self.layout, entries: &entries };
        context.device.create_bind_group(&descriptor)
    }
}
