"""Arguments of a Megatron-LM training run that change no result of a forward pass.

Names of Megatron-LM's argument parsers from core 0.5 to 0.19, and of what its runs add to them, by
subject. Whatever value they have is accepted.
"""

from __future__ import annotations

TRAINING: dict[str, str] = {
    "data": """
        bert_binary_head bert_embedder_type bert_load biencoder_projection_dim
        biencoder_shared_query_context_model block_data_path classes_fraction
        create_attention_mask_in_dataloader data_args_path data_cache_path data_path
        data_per_class_fraction data_sharding dataloader_defer_npy_index_mmap
        dataloader_fast_cache_load dataloader_inter_document_masking dataloader_type
        decoder_seq_length dino_bottleneck_size dino_freeze_last_layer dino_head_hidden_size
        dino_local_crops_number dino_local_img_size dino_norm_last_layer dino_teacher_temp
        dino_warmup_teacher_temp dino_warmup_teacher_temp_epochs embedding_path
        encoder_seq_length eod_mask_loss evidence_data_path exit_signal_handler_for_dataloader
        fim_data fim_eod_token fim_fragment_rate fim_middle_token fim_no_prefix fim_pad_token
        fim_prefix_token fim_rate fim_split_sample fim_spm_rate fim_suffix_token finetune
        finetune_data_split finetune_hf_dataset full_validation head_lr_mult ict_head_size
        ict_load img_h img_w indexer_batch_size indexer_log_interval iter_per_epoch mask_factor
        mask_prob mask_type max_tokens_to_oom memory_snapshot_path metadata_path
        mid_level_dataset_surplus mmap_bin_files mock_data multiple_validation_sets num_channels
        num_classes num_dataset_builder_threads num_workers object_storage_cache_path patch_dim
        per_dataset_sequences_path per_split_data_args_path phase_transition_iterations
        query_in_block_prob renormalize_blend_weights reset_attention_mask reset_position_ids
        s3_cache_path sample_rate sft sft_tokenizer_prompt_format short_seq_prob split
        swin_backbone_type test_data_path titles_data_path to_test train_data_path
        use_one_sent_docs valid_data_path validation_set_names vision_backbone_type
        vision_pretraining vision_pretraining_type
    """,
    "tokenizer and vocabulary: the tokenizer in use decides": """
        allow_ambiguous_pad_tokens chat_template legacy_tokenizer make_vocab_size_divisible_by
        merge_file null_tokenizer_eod_id null_tokenizer_pad_id pad_vocab_size should_pad_vocab
        special_tokens tiktoken_num_special_tokens tiktoken_pattern tiktoken_special_tokens
        tokenizer_hf_include_special_tokens tokenizer_hf_no_include_special_tokens
        tokenizer_hf_no_use_fast tokenizer_hf_use_fast tokenizer_metadata tokenizer_model
        tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_sentencepiece_legacy
        tokenizer_special_tokens tokenizer_type trust_remote_code vocab_extra_ids vocab_file
    """,
    "optimizer, schedule and batches": """
        _is_global_batch_size_explicitly_specified adam_beta1 adam_beta2 adam_eps
        align_grad_reduce align_param_gather apply_wd_to_qk_layernorm batch_size
        check_for_large_grads check_for_nan_in_loss_and_grad
        check_weight_hash_across_dp_replicas_interval clip_grad consumed_train_bins
        consumed_train_samples consumed_valid_samples curr_iteration decoupled_lr
        decoupled_min_lr decrease_batch_size_if_needed do_test do_train do_valid
        dump_param_to_param_group_map empty_unused_memory_level end_weight_decay
        eval_global_batch_size eval_interval eval_iters eval_micro_batch_size
        exit_duration_in_mins exit_interval exit_signal exit_signal_handler
        exit_signal_handler_for_training exp_avg_dtype exp_avg_sq_dtype freeze_all_layers
        global_batch_size hysteresis initial_loss_scale iteration iterations_to_skip lion_beta1
        lion_beta2 loss_scale loss_scale_window lr lr_decay_iters lr_decay_samples
        lr_decay_steps lr_decay_style lr_warmup_fraction lr_warmup_init lr_warmup_iters
        lr_warmup_samples lr_warmup_steps lr_wsd_decay_iters lr_wsd_decay_samples
        lr_wsd_decay_style main_grads_dtype main_params_dtype manual_gc manual_gc_eval
        manual_gc_interval micro_batch_size min_loss_scale min_lr model_type
        muon_coefficient_type muon_extra_scale_factor muon_fp32_matmul_prec muon_momentum
        muon_nesterov muon_num_ns_steps muon_scalar_optimizer muon_scale_mode muon_split_qkv
        muon_tp_mode muon_use_nesterov no_weight_decay_cond_type
        num_distributed_optimizer_instances num_floating_point_operations_so_far optimizer
        optimizer_cpu_offload optimizer_cuda_graph optimizer_offload_fraction
        overlap_cpu_optimizer_d2h_h2d overlap_grad_reduce
        overlap_param_gather_with_optimizer_step override_opt_param_scheduler pin_cpu_grads
        pin_cpu_params qad_train_target rampup_batch_size reuse_grad_buf_for_mxfp8_param_ag seed
        sgd_momentum skip_train skipped_train_samples start_eval_at_iter start_weight_decay
        step_batch_size_schedule suggested_communication_unit_size train_iters train_samples
        train_sync_interval use_checkpoint_opt_param_scheduler use_distributed_optimizer
        use_layer_wise_distributed_optimizer use_layer_wise_param_layout
        use_precision_aware_optimizer warmup wd_incr_steps weight_decay weight_decay_incr_style
        wsd_decay_steps
    """,
    "logging and profiling": """
        app_tag_run_name app_tag_run_version disable_straggler_on_startup enable_one_logger
        filter_warnings gpu_sniff_test_interval log_batch_size_to_tensorboard
        log_device_memory_used log_energy log_interval log_l2_norm_grad_to_tensorboard
        log_learning_rate_to_tensorboard log_loss_scale_to_tensorboard log_max_attention_logit
        log_memory_interval log_memory_to_tensorboard log_num_zeros_in_grad log_params_norm
        log_progress log_runtime_to_tensorboard log_straggler log_throughput
        log_throughput_to_tensorboard log_timers_to_tensorboard
        log_validation_ppl_to_tensorboard log_world_size_to_tensorboard logging_level
        logits_load_decode_threads logits_load_dir logits_load_ignore_errors
        logits_load_kd_loss_alpha logits_load_msc_prefetch_depth logits_load_prefetch_factor
        logits_save_dir logits_save_dtype logits_save_top_k logits_save_top_p
        logits_save_top_p_min_k memory_keys modules_to_filter nvtx_ranges one_logger_async
        one_logger_entity one_logger_project one_logger_run_name profile profile_ranks
        profile_step_end profile_step_start pytorch_profiler_collect_callstack
        pytorch_profiler_collect_chakra pytorch_profiler_collect_shapes record_memory_history
        record_shapes return_log_probs runtime_time_unit set_level_for_all_loggers
        skip_prompt_log_probs straggler_ctrlr_port straggler_minmax_count tensorboard_dir
        tensorboard_log_interval tensorboard_queue_size throughput_window_size timing_log_level
        timing_log_option use_nsys_profiler use_pytorch_profiler wandb_entity wandb_exp_name
        wandb_project wandb_save_dir
    """,
    "checkpoints and restarts": """
        adlr_autoresume adlr_autoresume_interval async_ckpt_cpu_priority async_ckpt_io_priority
        async_ckpt_use_cpu_shm async_save async_strategy auto_detect_ckpt_format
        calc_ft_timeouts check_for_nan_in_loss check_for_spiky_loss
        ckpt_assume_constant_structure ckpt_convert_format ckpt_convert_save
        ckpt_convert_update_legacy_dist_opt_format ckpt_format ckpt_fully_parallel_load
        ckpt_fully_parallel_load_exchange_algo ckpt_fully_parallel_load_process_group
        ckpt_fully_parallel_save ckpt_fully_parallel_save_deprecated
        ckpt_fully_parallel_save_process_group ckpt_load_validate_sharding_integrity ckpt_step
        dist_ckpt_format dist_ckpt_format_deprecated dist_ckpt_optim_fully_reshardable
        dist_ckpt_save_pre_mcore_014 dist_ckpt_strictness dist_ckpt_workers
        distrib_optim_fully_reshardable_mem_efficient enable_ft_package error_injection_rate
        error_injection_type exit_on_missing_checkpoint export_kd_cfg export_kd_finalize
        export_kd_teacher_ckpt_format export_kd_teacher_load export_kd_teacher_model_config
        export_legacy_megatron export_model_type export_te_mcore_model
        fault_injector_delay_start_iteration fault_injector_fault_delay
        fault_injector_fault_probabilities fault_injector_fault_types
        fault_injector_mtti_seconds fault_injector_num_ranks fault_injector_offset_seconds
        fault_injector_ranks fault_injector_seed ft_num_warmup_iters fully_parallel_load
        fully_parallel_save inprocess_active_world_size inprocess_barrier_timeout
        inprocess_completion_timeout inprocess_empty_cuda_cache inprocess_granularity
        inprocess_hard_timeout inprocess_heartbeat_interval inprocess_heartbeat_timeout
        inprocess_last_call_wait inprocess_max_iterations inprocess_monitor_process_interval
        inprocess_monitor_thread_interval inprocess_progress_watchdog_interval inprocess_restart
        inprocess_soft_timeout inprocess_termination_grace_time load load_main_params_from_ckpt
        load_model_opt_format load_optim load_rng most_recent_k no_load_optim no_load_rng
        no_save_optim no_save_rng non_persistent_ckpt_type non_persistent_global_ckpt_dir
        non_persistent_local_ckpt_algo non_persistent_local_ckpt_dir
        non_persistent_save_interval override_ckpt_iteration pretrained_checkpoint replication
        replication_factor replication_jump rerun_mode result_rejected_tracker_filename save
        save_activations_interval save_config_filepath save_dgrads_interval save_interval
        save_optim save_params_interval save_retain_interval save_rng save_tokenizer_assets
        save_tokens_per_expert_interval save_wgrads_interval stream_ckpt_dequant
        strict_fsdp_dtensor_load te_rng_tracker use_checkpoint_args use_dist_ckpt
        use_dist_ckpt_deprecated use_mp_args_from_checkpoint_args use_persistent_ckpt_worker
        use_tokenizer_model_from_checkpoint_args verify_integrity
    """,
    "processes and communication": """
        create_all_gather_group ddp_average_in_collective ddp_bucket_size ddp_num_buckets
        ddp_pad_buckets_for_high_nccl_busbw ddp_param_name_patterns_for_fp32_local_accumulation
        ddp_reduce_scatter_with_fp32_accumulation disable_msc_deprecated distributed_backend
        distributed_timeout_minutes distributed_timeout_seconds_after_init enable_experimental
        enable_full_sharding_in_hsdp enable_gloo_process_groups enable_msc fake_process_group
        flight_recorder_dump_on_timeout flight_recorder_dump_path
        flight_recorder_extra_dump_on_exec flight_recorder_include_only_active
        flight_recorder_include_stack_trace flight_recorder_trace_buffer_size
        fsdp_db_use_persist_buf_on_alloc_fail fsdp_double_buffer fsdp_manual_registration
        lazy_mpu_init megatron_fsdp_enable_fine_grained_param_gather
        megatron_fsdp_grad_comm_dtype megatron_fsdp_main_grads_dtype
        megatron_fsdp_main_params_dtype megatron_fsdp_max_pool_double_buffer
        nccl_communicator_config_path nccl_ub outer_dp_sharding_strategy overlap_param_gather
        sharp_enabled_group torch_fsdp2_reshard_after_forward use_custom_fsdp
        use_gloo_process_groups use_megatron_fsdp use_sharp use_torch_fsdp2
    """,
    "generation and reinforcement learning": """
        disable_chunked_prefill enable_chunked_prefill grpo_clamp_eps_lower grpo_clamp_eps_upper
        grpo_default_temperature grpo_default_top_p grpo_entropy_term_weight
        grpo_filter_groups_with_same_reward grpo_group_size grpo_iterations grpo_kl_beta
        grpo_prompts_per_step grpo_samples_per_iteration inference_batch_times_seqlen_threshold
        inference_coordinator_port inference_cuda_graph_all_prefills
        inference_cuda_graph_max_tokens inference_cuda_graph_scope
        inference_disable_ep_consensus inference_disable_triton_nvls_kernels
        inference_dynamic_batching inference_dynamic_batching_async_sched_mode
        inference_dynamic_batching_block_size
        inference_dynamic_batching_buffer_guaranteed_fraction
        inference_dynamic_batching_buffer_overflow_factor
        inference_dynamic_batching_buffer_size_gb inference_dynamic_batching_chunk_size
        inference_dynamic_batching_cuda_graph_max_tokens
        inference_dynamic_batching_cuda_graph_mixed_prefill_count
        inference_dynamic_batching_cuda_graph_sizing_distribution
        inference_dynamic_batching_enable_prefix_caching
        inference_dynamic_batching_logprobs_mode inference_dynamic_batching_mamba_memory_ratio
        inference_dynamic_batching_max_requests inference_dynamic_batching_max_requests_override
        inference_dynamic_batching_max_tokens inference_dynamic_batching_max_tokens_override
        inference_dynamic_batching_num_cuda_graphs
        inference_dynamic_batching_paused_buffer_size_gb
        inference_dynamic_batching_prefix_caching_coordinator_policy
        inference_dynamic_batching_prefix_caching_eviction_policy
        inference_dynamic_batching_prefix_caching_mamba_gb
        inference_dynamic_batching_prefix_caching_routing_alpha
        inference_dynamic_batching_sampling_backend
        inference_dynamic_batching_track_generated_token_events
        inference_dynamic_batching_track_paused_request_events
        inference_dynamic_batching_unified_memory_level inference_fuse_tp_communication
        inference_grouped_gemm_backend inference_logging_step_interval inference_max_batch_size
        inference_max_requests inference_max_seq_length
        inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type
        inference_rng_tracker inference_sampling_seed inference_shards
        inference_text_gen_server_logging inference_use_synchronous_zmq_collectives
        inference_wandb_logging langrl_env_config langrl_external_server
        langrl_inference_server_conversation_template langrl_inference_server_type
        num_speculative_tokens offset_sampling_seed_by_dp_rank output_bert_embeddings
        perform_rl_step refit_method rl_calculate_intra_group_similarity
        rl_consumption_granularity rl_default_temperature rl_default_top_k rl_default_top_p
        rl_enforce_generation_order rl_generation_batch_size rl_generation_lag
        rl_importance_sampling_truncation_coef rl_inference_expert_model_parallel_size
        rl_inference_expert_tensor_model_parallel_size rl_inference_logprobs_is_correction
        rl_inference_model_unified_memory_level rl_inference_parsers
        rl_inference_pipeline_model_parallel_size rl_inference_tensor_model_parallel_size
        rl_kv_cache_management_mode rl_num_parallel_generation_batches
        rl_num_parallel_generations rl_offload_inference_model_weights_when_idle
        rl_offload_kv_cache_during_training rl_offload_optimizer_during_inference
        rl_parallel_generation_tasks rl_partial_rollouts rl_persist_cuda_graphs rl_profile
        rl_profile_dir rl_prompts_per_eval rl_remove_kv_cache_during_training
        rl_reset_cuda_graphs rl_sequence_packing_algo rl_sequence_packing_bin_size
        rl_sequence_packing_max_sequences_per_bin rl_skip_bos_token rl_submission_granularity
        rl_training_cuda_graphs rl_use_sequence_packing rl_verify_model_weights_swap
        run_workload_inspector_server use_legacy_static_engine
    """,
}
"""Subject -> names, separated by blanks."""
